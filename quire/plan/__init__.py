"""What fits where: the machine as it is (hardware), what a forward pass needs (activations), the plan (memory), the ways out
when it does not fit (exits). Reads headers and `/proc`, never a tensor; no torch in this room."""
