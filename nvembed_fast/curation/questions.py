"""A question out of the first sentence of a documentation, in other words than the author's.

Users ask questions. So `question` turns a sentence that begins with a verb ("Remove the directory at path.")
into a question ("How can I delete the folder at path?"). It puts one of a few frames around the sentence and
another verb for its own (`VERBS`), and replaces every second of some words by one that means about the same
(`SAME`). A hash of the sentence decides which, so the same sentence always gives the same question.
"""

import re

from nvembed_fast.curation.text import drawn

__all__ = ["FRAMES", "SAME", "VERBS", "question"]

# {} is the sentence from its verb on, in the imperative, without its full stop
FRAMES = (
    "How do I {}?",
    "How can I {}?",
    "How to {}",
    "What is the way to {}?",
    "Which function can {}?",
    "I want to {}",
    "Is there something to {}?",
)
# verb -> verbs for it in a question. The first word of a docstring decides whether it becomes one
VERBS: dict[str, tuple[str, ...]] = {
    "return": ("get", "obtain", "find"),
    "get": ("obtain", "look up", "find"),
    "compute": ("calculate", "work out", "compute"),
    "calculate": ("compute", "work out"),
    "create": ("make", "build", "set up"),
    "construct": ("make", "build"),
    "build": ("make", "put together"),
    "make": ("create", "build"),
    "generate": ("produce", "create"),
    "remove": ("delete", "drop", "get rid of"),
    "delete": ("remove", "get rid of"),
    "check": ("find out", "test", "make sure"),
    "test": ("check", "find out"),
    "determine": ("find out", "decide"),
    "convert": ("turn", "transform", "change"),
    "transform": ("turn", "convert"),
    "parse": ("read", "interpret", "analyse"),
    "read": ("load", "read in"),
    "load": ("read", "open"),
    "write": ("save", "store"),
    "save": ("store", "write"),
    "set": ("change", "choose", "define"),
    "update": ("change", "refresh"),
    "add": ("append", "put in", "attach"),
    "append": ("add", "attach"),
    "find": ("search for", "locate", "look for"),
    "search": ("look", "find"),
    "apply": ("use", "run"),
    "evaluate": ("compute", "work out"),
    "estimate": ("guess", "approximate"),
    "plot": ("draw", "show"),
    "draw": ("paint", "plot"),
    "print": ("show", "output"),
    "display": ("show", "present"),
    "show": ("display", "see"),
    "split": ("divide", "cut", "break up"),
    "join": ("combine", "connect"),
    "merge": ("combine", "join"),
    "combine": ("merge", "join"),
    "copy": ("duplicate", "clone"),
    "sort": ("order", "arrange"),
    "iterate": ("loop", "go"),
    "yield": ("go through", "iterate over"),
    "register": ("sign up", "register"),
    "open": ("open",),
    "close": ("shut", "end"),
    "start": ("begin", "launch"),
    "stop": ("end", "halt"),
    "run": ("execute", "start"),
    "execute": ("run",),
    "call": ("invoke", "run"),
    "send": ("transmit", "deliver"),
    "receive": ("get", "accept"),
    "wait": ("wait", "block"),
    "raise": ("throw",),
    "validate": ("check", "verify"),
    "verify": ("check", "make sure"),
    "replace": ("swap", "substitute"),
    "extract": ("take out", "pull out"),
    "select": ("choose", "pick"),
    "filter": ("keep only", "filter"),
    "format": ("lay out", "format"),
    "encode": ("encode",),
    "decode": ("decode",),
    "fit": ("train", "fit"),
    "predict": ("forecast", "predict"),
    "perform": ("do", "carry out"),
    "insert": ("put", "add"),
    "initialize": ("set up", "prepare"),
    "define": ("specify", "declare"),
    "count": ("count", "tell the number of"),
    "list": ("enumerate", "show"),
    "describe": ("explain", "get details of"),
    "map": ("map",),
    "reset": ("restore", "clear"),
    "clear": ("empty", "reset"),
    "store": ("keep", "save"),
    "fetch": ("get", "download"),
    "retrieve": ("get", "fetch"),
    "restore": ("bring back", "recover"),
    "resolve": ("look up", "resolve"),
    "render": ("draw", "produce"),
    "reverse": ("turn around", "invert"),
    "round": ("round",),
    "rotate": ("turn", "rotate"),
    "sample": ("draw", "pick at random"),
    "solve": ("find the solution of", "solve"),
    "simplify": ("make simpler", "simplify"),
    "expand": ("widen", "expand"),
    "integrate": ("integrate",),
    "interpolate": ("interpolate",),
    "specify": ("choose", "say"),
    "provide": ("offer", "supply"),
    "handle": ("deal with", "process"),
    "process": ("handle", "work through"),
    "configure": ("set up", "adjust"),
    "modify": ("change", "alter"),
    "associate": ("link", "connect"),
    "enable": ("turn on", "allow"),
    "disable": ("turn off", "switch off"),
    "cancel": ("stop", "call off"),
    "attach": ("fasten", "connect"),
    "detach": ("separate", "disconnect"),
    "export": ("write out", "export"),
    "import": ("bring in", "load"),
    "accept": ("agree to", "take"),
    "reject": ("refuse", "turn down"),
    "grant": ("give", "allow"),
    "revoke": ("take back", "withdraw"),
    "assign": ("give", "allocate"),
    "allocate": ("reserve", "assign"),
    "release": ("free", "let go of"),
    "submit": ("hand in", "send"),
    "publish": ("make public", "publish"),
    "put": ("place", "store"),
    "tag": ("label", "mark"),
    "measure": ("determine", "measure"),
    "compare": ("compare", "find the differences of"),
    "manage": ("administer", "control"),
    "collect": ("gather", "collect"),
    "rename": ("give another name to", "rename"),
    "move": ("move", "shift"),
    "upload": ("send", "upload"),
    "download": ("fetch", "download"),
    "install": ("set up", "install"),
}
# they make another verb of the one in front of them, so that one stays: make sure, set up
PARTICLES = ("sure", "up", "out", "off", "on", "down", "in", "over", "away")
# in front of them the first word is a noun: set of, process id. Some verbs go with "for"
NO_OBJECTS = ("of", "id", "ids", "is", "are", "for")
WITH_FOR = ("check", "find", "search", "select", "solve", "test", "wait")
# nouns and adjectives -> words that mean the same
SAME: dict[str, str] = {
    "directory": "folder",
    "directories": "folders",
    "string": "text",
    "strings": "texts",
    "dictionary": "mapping",
    "sequence": "list",
    "elements": "items",
    "element": "item",
    "argument": "parameter",
    "arguments": "parameters",
    "exception": "error",
    "exceptions": "errors",
    "integer": "whole number",
    "integers": "whole numbers",
    "index": "position",
    "indices": "positions",
    "maximum": "largest value",
    "minimum": "smallest value",
    "mean": "average",
    "specified": "given",
    "contains": "includes",
    "specific": "particular",
    "multiple": "several",
    "current": "present",
    "whether": "if",
    "identical": "the same",
    "equal": "the same",
    "containing": "with",
    "entries": "rows",
    "associated": "connected",
    "information": "details",
    "existing": "present",
    "corresponding": "matching",
    "graph": "network",
    "vertices": "nodes",
    "image": "picture",
    "images": "pictures",
    "variance": "spread",
    "connection": "link",
    "URL": "web address",
    "timestamp": "time",
    "length": "size",
    "shape": "dimensions",
}


def question(sentence: str) -> str | None:
    """A question that a sentence answers. None: it begins with no verb of `VERBS`, or with a noun."""
    first, _, rest = sentence.rstrip(" .:!").partition(" ")
    verb = _base(first.lower())
    rest_words = rest.split()
    if verb is None or not 2 <= len(rest_words) <= 24:
        return None
    follows = rest_words[0].lower()
    if follows in NO_OBJECTS and not (follows == "for" and verb in WITH_FOR):
        return None
    verbs = VERBS[verb]
    chosen = verbs[drawn(sentence, "verb") % len(verbs)]
    if follows in PARTICLES:
        chosen = verb
    if verb in ("return", "check", "test", "determine") and re.match(r"(true|whether|if)\b", rest, re.I):
        chosen = "find out"
        rest_words[0] = "whether"
        if len(rest_words) > 1 and rest_words[1].lower() in ("if", "whether", "iff"):
            del rest_words[1]
    words = [chosen]
    for word in rest_words:
        if word in SAME and drawn(sentence, word) % 2:
            word = SAME[word]
            if words[-1] in ("a", "an"):
                words[-1] = "an" if word[0] in "aeiou" else "a"
        words.append(word)
    frame = FRAMES[drawn(sentence, "frame") % len(FRAMES)]
    return frame.format(" ".join(words))


def _base(word: str) -> str | None:
    """The imperative of a verb of `VERBS` that may stand in the third person."""
    for base in (word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)):
        if base in VERBS:
            return base
    return None
