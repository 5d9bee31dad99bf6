"""Small facts about the world, and a little dictionary: what the model has to know by heart.

Every row was written for this project. An instance is a fact in one wording; held-out means a wording that this fact
was never asked in.
"""

from __future__ import annotations

from random import Random

from embedded_data.exchange import Exchange, pick_wording, vary
from embedded_data.words import split_pairs

CAPITALS = split_pairs(
    """France:Paris Germany:Berlin Italy:Rome Spain:Madrid Portugal:Lisbon Austria:Vienna Switzerland:Bern
    Belgium:Brussels Poland:Warsaw Greece:Athens Sweden:Stockholm Norway:Oslo Denmark:Copenhagen Finland:Helsinki
    Ireland:Dublin Hungary:Budapest Romania:Bucharest Japan:Tokyo China:Beijing India:Delhi Egypt:Cairo
    Kenya:Nairobi Canada:Ottawa Brazil:Brasilia Peru:Lima Chile:Santiago Cuba:Havana Australia:Canberra
    Russia:Moscow Turkey:Ankara Iran:Tehran Thailand:Bangkok Vietnam:Hanoi England:London Scotland:Edinburgh
    Ukraine:Kyiv Iceland:Reykjavik"""
)
LANGUAGES = split_pairs(
    """France:French Germany:German Italy:Italian Spain:Spanish Portugal:Portuguese Poland:Polish Greece:Greek
    Sweden:Swedish Norway:Norwegian Denmark:Danish Finland:Finnish Hungary:Hungarian Japan:Japanese China:Chinese
    Brazil:Portuguese Russia:Russian Turkey:Turkish Thailand:Thai England:English Austria:German Mexico:Spanish"""
)
ELEMENTS = split_pairs(
    """hydrogen:H helium:He carbon:C nitrogen:N oxygen:O sodium:Na iron:Fe copper:Cu silver:Ag gold:Au lead:Pb zinc:Zn
    tin:Sn neon:Ne sulfur:S potassium:K calcium:Ca aluminum:Al"""
)
OPPOSITES = split_pairs(
    """hot:cold big:small fast:slow happy:sad light:dark old:new up:down left:right open:closed full:empty hard:soft
    wet:dry high:low long:short early:late rich:poor good:bad strong:weak loud:quiet day:night yes:no true:false
    first:last inside:outside clean:dirty near:far"""
)
SOUNDS = split_pairs(
    """dog:woof cat:meow cow:moo duck:quack sheep:baa horse:neigh lion:roar owl:hoot pig:oink hen:cluck"""
)
YOUNG = split_pairs(
    """dog:puppy cat:kitten cow:calf sheep:lamb horse:foal hen:chick lion:cub bear:cub duck:duckling goat:kid"""
)
HUES = {
    "the sky": "blue",
    "grass": "green",
    "snow": "white",
    "coal": "black",
    "a banana": "yellow",
    "blood": "red",
    "a carrot": "orange",
    "milk": "white",
    "the sun": "yellow",
    "a tomato": "red",
}
AMOUNTS = {
    "days are in a week": "A week has 7 days.",
    "hours are in a day": "A day has 24 hours.",
    "minutes are in an hour": "An hour has 60 minutes.",
    "seconds are in a minute": "A minute has 60 seconds.",
    "months are in a year": "A year has 12 months.",
    "days are in a year": "A year has 365 days, and a leap year 366.",
    "legs does a spider have": "A spider has 8 legs.",
    "legs does a dog have": "A dog has 4 legs.",
    "legs does an insect have": "An insect has 6 legs.",
    "sides does a triangle have": "A triangle has 3 sides.",
    "sides does a square have": "A square has 4 sides.",
    "bits are in a byte": "A byte has 8 bits.",
    "planets are in the solar system": "There are 8 planets.",
    "continents are there": "There are 7 continents.",
    "letters are in the English alphabet": "The English alphabet has 26 letters.",
    "centimeters are in a meter": "A meter has 100 centimeters.",
    "grams are in a kilogram": "A kilogram has 1000 grams.",
    "wheels does a bicycle have": "A bicycle has 2 wheels.",
    "wheels does a car have": "A car has 4 wheels.",
    "strings does a violin have": "A violin has 4 strings.",
}
SINGLE = {
    "the largest planet": "Jupiter is the largest planet.",
    "the smallest planet": "Mercury is the smallest planet.",
    "the largest ocean": "The Pacific is the largest ocean.",
    "the highest mountain": "Mount Everest is the highest mountain.",
    "the largest animal": "The blue whale is the largest animal.",
    "the fastest land animal": "The cheetah is the fastest land animal.",
    "the tallest animal": "The giraffe is the tallest animal.",
    "the largest continent": "Asia is the largest continent.",
    "the largest country": "Russia is the largest country.",
    "the planet closest to the sun": "Mercury is the planet closest to the sun.",
    "the red planet": "Mars is called the red planet.",
    "the boiling point of water": "Water boils at 100 degrees Celsius.",
    "the freezing point of water": "Water freezes at 0 degrees Celsius.",
    "the chemical formula of water": "The formula of water is H2O.",
    "the speed of light": "Light travels about 300,000 kilometers per second.",
    "the star nearest to the Earth": "The sun is the star nearest to the Earth.",
    "the first month of the year": "January is the first month of the year.",
    "the last month of the year": "December is the last month of the year.",
    "the shortest month": "February is the shortest month.",
    "the first day of the week": "Monday is the first day of the week.",
    "the square root of 16": "The square root of 16 is 4.",
    "the value of pi": "Pi is about 3.14159.",
}
AUTHORS = {
    "Hamlet": "William Shakespeare",
    "Romeo and Juliet": "William Shakespeare",
    "Don Quixote": "Miguel de Cervantes",
    "Faust": "Goethe",
    "War and Peace": "Leo Tolstoy",
    "Oliver Twist": "Charles Dickens",
    "Pride and Prejudice": "Jane Austen",
    "Moby Dick": "Herman Melville",
    "Frankenstein": "Mary Shelley",
    "the Odyssey": "Homer",
    "Dracula": "Bram Stoker",
    "Les Miserables": "Victor Hugo",
}
MEANINGS = {
    "a variable": "A variable is a name that refers to a value.",
    "a function": "A function is a named piece of code that can be called with arguments.",
    "a list": "A list is an ordered collection of values that can be changed.",
    "a dictionary": "A dictionary maps keys to values.",
    "a tuple": "A tuple is an ordered collection of values that cannot be changed.",
    "a set": "A set is a collection of different values without order.",
    "a string": "A string is a sequence of characters.",
    "a loop": "A loop repeats a piece of code.",
    "a class": "A class describes a kind of object and its methods.",
    "a module": "A module is a file with Python code that can be imported.",
    "an exception": "An exception is an error that a program can catch.",
    "a token": "A token is a small piece of text, often a part of a word.",
    "a language model": "A language model predicts the next token of a text.",
    "machine learning": "Machine learning means that a program learns rules from examples.",
    "Python": "Python is a programming language that is easy to read.",
    "SQL": "SQL is a language for asking questions to databases.",
    "JSON": "JSON is a text format for data with objects, lists, strings and numbers.",
    "a database": "A database is an organized store of data.",
    "an API": "An API is the way in which one program talks to another.",
    "a compiler": "A compiler translates source code into machine code.",
    "the internet": "The internet is a network that connects computers all over the world.",
    "gravity": "Gravity is the force that pulls things toward each other.",
    "photosynthesis": "Photosynthesis is how plants make food from light, water and air.",
    "an atom": "An atom is the smallest piece of a chemical element.",
    "a cell": "A cell is the smallest unit of life.",
    "democracy": "Democracy means that the people choose who governs.",
    "rain": "Rain is water that falls from clouds.",
    "a volcano": "A volcano is a mountain that can throw out lava.",
    "a neural network": "A neural network is a function with many weights that are learned from data.",
    "bread": "Bread is a food baked from flour, water and yeast.",
    "a server": "A server is a computer or program that answers requests.",
}
REASONS = {
    "is the sky blue": "The sky is blue because air scatters blue light more than red light.",
    "do leaves fall in autumn": "Leaves fall because trees save water and energy for the winter.",
    "does it rain": "It rains when water drops in clouds become too heavy to float.",
    "do we sleep": "We sleep so that body and brain can rest.",
    "do birds fly south": "Birds fly south to find food and warmth in the winter.",
    "is the sea salty": "The sea is salty because rivers carry salt from the rocks into it.",
    "is there day and night": "There is day and night because the Earth turns around itself.",
    "do we eat": "We eat to get energy and to grow.",
    "does ice float": "Ice floats because it is lighter than water.",
}
WORDS = {
    "French": split_pairs(
        """dog:chien cat:chat house:maison water:eau bread:pain sun:soleil moon:lune book:livre friend:ami
        tree:arbre hello:bonjour thanks:merci red:rouge green:vert one:un two:deux three:trois"""
    ),
    "German": split_pairs(
        """dog:Hund cat:Katze house:Haus water:Wasser bread:Brot sun:Sonne moon:Mond book:Buch friend:Freund
        tree:Baum hello:hallo thanks:danke red:rot green:grün one:eins two:zwei three:drei"""
    ),
    "Spanish": split_pairs(
        """dog:perro cat:gato house:casa water:agua bread:pan sun:sol moon:luna book:libro friend:amigo
        tree:árbol hello:hola thanks:gracias red:rojo green:verde one:uno two:dos three:tres"""
    ),
    "Italian": split_pairs(
        """dog:cane cat:gatto house:casa water:acqua bread:pane sun:sole moon:luna book:libro friend:amico
        tree:albero hello:ciao thanks:grazie red:rosso green:verde one:uno two:due three:tre"""
    ),
}

Table = tuple[tuple[str, ...], dict[str, str], str]
TABLES: tuple[Table, ...] = (
    (
        (
            "What is the capital of {}?",
            "Which city is the capital of {}?",
            "Name the capital of {}.",
            "Capital of {}?",
            "Tell me the capital of {}.",
            "What's the capital city of {}?",
            "Do you know the capital of {}?",
        ),
        CAPITALS,
        "The capital of {k} is {v}.",
    ),
    (
        (
            "What language is spoken in {}?",
            "Which language do people speak in {}?",
            "What do they speak in {}?",
            "What is the language of {}?",
        ),
        LANGUAGES,
        "In {k}, people speak {v}.",
    ),
    (
        (
            "What is the chemical symbol for {}?",
            "What is the symbol of {}?",
            "Which symbol does {} have?",
            "Chemical symbol of {}?",
        ),
        ELEMENTS,
        "The symbol of {k} is {v}.",
    ),
    (
        (
            "What is the opposite of {}?",
            "Give me the opposite of {}.",
            "Opposite of {}?",
            "Which word means the opposite of {}?",
            "Antonym of {}?",
        ),
        OPPOSITES,
        "The opposite of {k} is {v}.",
    ),
    (
        ("What sound does a {} make?", "What does a {} say?", "Which sound does the {} make?"),
        SOUNDS,
        "The {k} says {v}.",
    ),
    (
        ("What is a young {} called?", "What do you call a baby {}?", "What is the name of a baby {}?"),
        YOUNG,
        "A young {k} is called a {v}.",
    ),
    (
        ("What color is {}?", "Which color is {}?", "What is the color of {}?", "Tell me the color of {}."),
        HUES,
        "The color of {k} is {v}.",
    ),
    (
        ("How many {}?", "Can you tell me how many {}?", "Do you know how many {}?", "Tell me how many {}."),
        AMOUNTS,
        "{v}",
    ),
    (("What is {}?", "Tell me {}.", "Do you know {}?", "Name {}.", "Can you tell me {}?"), SINGLE, "{v}"),
    (
        ("Who wrote {}?", "Who is the author of {}?", "Which author wrote {}?", "Author of {}?"),
        AUTHORS,
        "{v} wrote {k}.",
    ),
    (
        (
            "What is {}?",
            "Explain {}.",
            "What does {} mean?",
            "Can you explain {}?",
            "Define {}.",
            "Tell me about {}.",
            "Explain {} in one sentence.",
        ),
        MEANINGS,
        "{v}",
    ),
    (("Why {}?", "Can you tell me why {}?", "Explain why {}.", "Do you know why {}?"), REASONS, "{v}"),
)
WEIGHTS = tuple(len(table[1]) ** 0.7 for table in TABLES)


def fact(random: Random) -> Exchange:
    wordings, table, answer = random.choices(TABLES, WEIGHTS)[0]
    subject = random.choice(list(table))
    index, wording = pick_wording(random, wordings)
    text = answer.format(k=subject, v=table[subject])
    return Exchange(f"{index}|{answer}|{subject}", vary(random, wording.format(subject)), text[0].upper() + text[1:])


TRANSLATE = (
    "Translate '{w}' to {l}.",
    "What is {w} in {l}?",
    "How do you say {w} in {l}?",
    "Translate to {l}: {w}",
    "Translate into {l}: {w}",
    "{l} word for {w}?",
)


def translation(random: Random) -> Exchange:
    language = random.choice(list(WORDS))
    word, foreign = random.choice(list(WORDS[language].items()))
    index, wording = pick_wording(random, TRANSLATE)
    return Exchange(f"{index}|{word}|{language}", vary(random, wording.format(w=word, l=language)), foreign)


def statement(random: Random) -> str:
    """A fact as a plain sentence, for the text part of the training."""
    _, table, answer = random.choices(TABLES, WEIGHTS)[0]
    subject = random.choice(list(table))
    text = answer.format(k=subject, v=table[subject])
    return text[0].upper() + text[1:]
