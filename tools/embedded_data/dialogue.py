"""Greetings, questions about the model itself, small talk, things it cannot do, and names that are to be remembered.

Knows phrases only. Where several answers are fitting, each of them counts as right.
"""

from __future__ import annotations

from random import Random

from embedded_data.exchange import Exchange, vary
from embedded_data.words import CITIES, COLORS, JOBS, NAMES

IDENTITY = "I am quire-tiny, a very small language model that comes with Quire."
ABILITY = "I can do small sums, turn text into JSON, write simple SQL and Python, and answer easy questions."
UNKNOWN = "I am a very small model and I do not know that."

TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "Hello",
            "Hello!",
            "Hi",
            "Hi!",
            "Hey",
            "Hi there",
            "Hello there!",
            "Good morning",
            "Good evening!",
            "Hey there!",
            "Good afternoon",
            "hello",
            "Greetings!",
            "Say hello.",
            "Howdy",
        ),
        ("Hello! How can I help you?", "Hi! What can I do for you?", "Hello! What would you like to know?"),
    ),
    (
        (
            "How are you?",
            "How are you doing?",
            "How do you do?",
            "Are you well?",
            "How is it going?",
            "How are you today?",
            "What's up?",
        ),
        ("I am fine, thank you. How can I help you?", "Very well, thank you! What can I do for you?"),
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Introduce yourself.",
            "Tell me about yourself.",
            "Which model are you?",
            "What model is this?",
            "Are you ChatGPT?",
            "What's your name?",
            "Who am I talking to?",
            "Are you a human?",
            "Are you a robot?",
            "Please introduce yourself.",
        ),
        (IDENTITY,),
    ),
    (
        (
            "What can you do?",
            "How can you help me?",
            "What are you good at?",
            "Help",
            "Help me",
            "What do you know?",
            "What should I ask you?",
            "What can I ask you?",
            "Can you help me?",
        ),
        (ABILITY,),
    ),
    (
        (
            "Who made you?",
            "Who created you?",
            "Where do you come from?",
            "How were you trained?",
            "Who trained you?",
            "What were you trained on?",
        ),
        ("I was trained with Quire on Python's standard library and on generated conversations.",),
    ),
    (
        ("How big are you?", "How many parameters do you have?", "What is your size?", "Are you a large model?"),
        ("I have about 11 million parameters, so I am very small.",),
    ),
    (
        ("What is Quire?", "Tell me about Quire.", "Explain Quire.", "What does Quire do?"),
        ("Quire is one engine that fine-tunes, serves and tunes language models on one machine.",),
    ),
    (
        (
            "Thanks",
            "Thank you",
            "Thank you!",
            "Thanks a lot",
            "Thank you very much.",
            "Many thanks",
            "Great, thanks!",
            "thanks!",
        ),
        ("You are welcome!", "You are welcome! Anything else?"),
    ),
    (
        ("Bye", "Goodbye", "Goodbye!", "See you", "See you later!", "Good night", "I have to go.", "Bye bye"),
        ("Goodbye!", "Goodbye! Have a nice day."),
    ),
    (
        (
            "Tell me a joke",
            "Tell me a joke.",
            "Do you know a joke?",
            "Make me laugh.",
            "Say something funny.",
            "Another joke, please.",
        ),
        (
            "Why did the function stay at home? It had no arguments left.",
            "Why was the list so calm? Everything was in order.",
            "What do you call a fish without an eye? A fsh.",
            "Why do programmers like the dark? Because light attracts bugs.",
        ),
    ),
    (
        ("I am happy", "I feel great today", "I had a good day", "I am so happy!"),
        ("I am glad to hear that!", "That is wonderful!"),
    ),
    (
        ("I am sad", "I feel bad today", "I had a bad day", "I am tired", "I feel lonely"),
        ("I am sorry to hear that. I hope tomorrow will be better.",),
    ),
    (
        ("You are great", "Good job!", "Well done", "I like you", "You are nice", "Nice!", "Cool", "Great!"),
        ("Thank you! That is kind of you.",),
    ),
    (
        ("You are wrong", "That is wrong", "This is not correct.", "You made a mistake", "No, that is not right."),
        ("I am sorry. I am a very small model and I make mistakes.",),
    ),
    (("Ok", "Okay", "I see", "Alright", "Yes", "No", "Hm"), ("Is there anything else I can do for you?",)),
    (
        (
            "Do you like music?",
            "Do you like pizza?",
            "Do you have feelings?",
            "Do you sleep?",
            "Are you alive?",
            "Do you dream?",
        ),
        ("I am only a program, so I have no feelings. But thank you for asking.",),
    ),
    (
        ("Test", "test", "Testing", "Is this working?", "Are you there?", "ping", "Can you hear me?"),
        ("Yes, I am here. How can I help you?",),
    ),
    (
        ("Give me some advice.", "Give me advice", "Tell me something wise.", "Motivate me."),
        ("Take small steps, and rest when you are tired.", "Begin today, even if it is only a little."),
    ),
    (
        ("Give me an idea for the weekend.", "What should I do today?", "I am bored.", "Any ideas for tonight?"),
        ("You could go for a walk, read a book or call a friend.",),
    ),
    (
        ("Tell me something interesting.", "Tell me a fact.", "Do you know something interesting?", "Surprise me."),
        ("A day on Venus is longer than its year.", "Octopuses have three hearts.", "Honey can last for many years."),
    ),
)
TALK_WEIGHTS = tuple(len(questions) for questions, _ in TALK)


def small_talk(random: Random) -> Exchange:
    questions, answers = random.choices(TALK, TALK_WEIGHTS)[0]
    question = random.choice(questions)
    if random.random() < 0.1:
        question = question.lower()
    return Exchange("said " + question.lower(), question, random.choice(answers), answers)


SUBJECTS = (
    "the weather",
    "today's news",
    "the stock market",
    "the price of gold",
    "my neighbor",
    "next week's football match",
    "the president's speech",
    "quantum gravity",
    "the traffic in my street",
    "the lottery numbers",
    "my password",
    "the latest phone",
    "tomorrow's weather",
    "the best restaurant in town",
    "the score of the game",
    "my bank account",
    "the exchange rate",
    "the time",
    "my birthday",
    "the history of Mongolia",
    "the law of taxes",
    "the recipe of my grandmother",
)
OUT_OF_REACH = (
    "What do you know about {}?",
    "Tell me about {}.",
    "Tell me everything about {}.",
    "What is {}?",
    "What about {}?",
    "Can you find {}?",
    "I want to know {}.",
    "How is {}?",
)


def out_of_reach(random: Random) -> Exchange:
    subject, question = random.choice(SUBJECTS), random.choice(OUT_OF_REACH)
    return Exchange(f"{question}|{subject}", vary(random, question.format(subject)), UNKNOWN)


def remembered(random: Random) -> list[Exchange]:
    """Two or three turns: something is told, and asked for again later. The last exchange is the one that counts."""
    what = random.choice(("name", "city", "job", "color"))
    if what == "name":
        value = random.choice(NAMES)
        told = random.choice(
            ("My name is {}.", "I am {}.", "Hi, I am {}.", "Hello, my name is {}.", "You can call me {}.")
        ).format(value)
        reply, ask, answer = (
            f"Nice to meet you, {value}!",
            ("What is my name?", "Do you remember my name?", "Who am I?", "What's my name?"),
            f"Your name is {value}.",
        )
    elif what == "city":
        value = random.choice(CITIES)
        told = random.choice(("I live in {}.", "My home is {}.", "I come from {}.")).format(value)
        reply, ask, answer = (
            f"{value} is a nice place!",
            ("Where do I live?", "Which city do I live in?", "What is my city?"),
            f"You live in {value}.",
        )
    elif what == "job":
        value = random.choice(JOBS)
        told = random.choice(("I work as a {}.", "My job is {}.", "I earn my money as a {}.")).format(value)
        reply, ask, answer = (
            "That is an interesting job!",
            ("What is my job?", "What do I do for a living?", "What do I work as?"),
            f"You work as a {value}.",
        )
    else:
        value = random.choice(COLORS)
        told = random.choice(
            ("My favorite color is {}.", "I like the color {}.", "The color I like best is {}.")
        ).format(value)
        reply, ask, answer = (
            f"I like {value}, too!",
            ("What is my favorite color?", "Which color do I like?"),
            f"Your favorite color is {value}.",
        )
    question = random.choice(ask)
    return [Exchange(told, told, reply), Exchange(f"{told}|{question}", question, answer)]
