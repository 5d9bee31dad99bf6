"""Stub while train is being written."""
class Trainer:
    def __init__(self, *a): pass
    def start(self): pass
    def stop(self): pass
