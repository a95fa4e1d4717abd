"""The drawing of a hybrid model over four ranks: the messages of each kind of layer, and the work during them.

The upper half has four blocks, with a column for each rank. The lower half is the schedule of one linear layer
on one rank, and its mirror image in backward.
"""

from __future__ import annotations

from typing import Any

from analysis.drawings.sheet import TITLE, Sheet

SPANS = ("0 to T-1", "T to 2T-1", "2T to 3T-1", "3T to 4T-1")  # the tokens of each rank
WIDTH, MARGIN = 8.0, 0.12  # inches
LABEL = 1.5  # width of the column that names the blocks
GAP = 0.14  # between ranks
TALL = 1.1  # height of a block
CELL = (WIDTH - LABEL - MARGIN - GAP * (len(SPANS) - 1)) / len(SPANS)
LINEAR, SOFTMAX, TRAVEL, CALM = "#cfe0f1", "#f3c98b", "#14406f", "#ececec"
MESSAGE: Any = {"facecolor": TRAVEL, "color": "white", "size": 8, "linewidth": 0}
BLOCKS = {  # of each kind: its colour, what a rank sends, and the collective that joins the ranks
    "linear": (
        LINEAR,
        "sends one state S of\nfixed size, and W-1\ntokens if it convolves\nover W",
        "AllGather of S, with decays that depend on data: the same size at any T.  Backward: AllGather of dS",
    ),
    "softmax": (
        SOFTMAX,
        "sends K and V of\nall its T tokens",
        "AllGather of keys and values: its size grows with T.  Backward: ReduceScatter of dK and dV",
    ),
}
BOXES = {  # on each rank, from the corner of its column: x, y, width, height, words and colour
    "linear": (
        (0, 0.78, CELL, 0.24, "", CALM),
        (0, 0.42, CELL, 0.29, "", LINEAR),
        (CELL - 0.42, 0.46, 0.34, 0.21, "$S_{rank}$", "white"),
    ),
    "softmax": (
        (0, 0.42, CELL, 0.6, "", SOFTMAX),
        (0.08, 0.64, CELL - 0.16, 0.16, "$K_{rank}$", "white"),
        (0.08, 0.46, CELL - 0.16, 0.16, "$V_{rank}$", "white"),
    ),
}
NAMES = {"linear": ((0.9, "conv"), (0.565, "recurrence")), "softmax": ((0.91, "attention"),)}  # y and words
REST = "In backward the gradients of the W-1 tokens travel back. Norms, projections and MLPs work on each token alone."
FOLD = """fold: of the states that all ranks sent, each rank makes the one that enters its own span; in backward, the
gradient of the one that leaves it. In softmax layers the attention to a rank's own keys hides the gather."""
PHASES = {  # of a linear layer: the words in the box, its length and its colour
    "states": ("chunk\nstates", 1.05, LINEAR),
    "intra": ("intra-chunk work,\nneeds no other rank", 2.55, "white"),
    "fold": ("fold", 0.6, "#b5b5b5"),
    "inter": ("inter-\nchunk", 0.9, CALM),
}
WAYS = {  # the order of the phases, and the words of the gather
    "forward": (("states", "intra", "fold", "inter"), "AllGather of S"),
    "backward, the mirror image (gradients)": (("inter", "intra", "fold", "states"), "AllGather of dS"),
}


def draw() -> Sheet:
    """Draw the whole sheet."""
    sheet = Sheet(WIDTH, 8.46, "Blocks L L S L over four ranks, what each sends, and the schedule of a linear layer.")
    sheet.text(MARGIN, 8.26, "A hybrid model, its sequence cut over four ranks: what each kind of layer sends", **TITLE)
    sheet.text(MARGIN, 7.89, "sequence of 4 T")
    for rank, tokens in enumerate(SPANS):
        sheet.box(LABEL + rank * (CELL + GAP), 7.76, CELL, 0.26, f"rank {rank}: {tokens}", facecolor=CALM, size=8.5)
    for number, kind in enumerate(("linear", "linear", "softmax", "linear"), 1):
        _block(sheet, 7.76 - number * (TALL + 0.12), number, kind)
    sheet.text(MARGIN, 2.73, REST, size=8)
    _timeline(sheet)
    return sheet


def _block(sheet: Sheet, y: float, number: int, kind: str) -> None:
    """Draw a block with its lower edge at `y`: its name, its cells on every rank, and the collective that joins them.

    A linear block has a short convolution too, which reads the last tokens of the rank before.
    """
    fill, sends, gathers = BLOCKS[kind]
    sheet.box(MARGIN - 0.06, y, WIDTH - 2 * MARGIN + 0.12, TALL, facecolor="none", edgecolor="0.7", zorder=1)
    sheet.text(MARGIN + 0.02, y + TALL - 0.2, f"block {number}", size=8)
    sheet.box(MARGIN + 0.54, y + TALL - 0.32, 0.7, 0.24, kind, facecolor=fill, weight="bold", rounded=0.04, size=8.5)
    sheet.text(MARGIN + 0.02, y + 0.38, sends, size=8)
    sheet.box(LABEL, y + 0.07, WIDTH - LABEL - MARGIN, 0.21, gathers, **MESSAGE)
    for rank in range(len(SPANS)):
        left, right = LABEL + rank * (CELL + GAP), LABEL + rank * (CELL + GAP) + CELL
        for x, place, width, height, words, colour in BOXES[kind]:
            sheet.box(left + x, y + place, width, height, words.format(rank=rank), facecolor=colour, size=8.5)
        for place, words in NAMES[kind]:
            sheet.text(left + 0.12, y + place, words, size=8)
        sheet.arrow((right - 0.25, y + 0.42), (right - 0.25, y + 0.28), arrowstyle="<|-|>", mutation_scale=6, zorder=4)
        if kind == "linear" and rank < len(SPANS) - 1:
            sheet.text(right - 0.19, y + 0.9, "last W-1", size=7.5, ha="right")
            sheet.box(right - 0.14, y + 0.81, 0.1, 0.18, facecolor=TRAVEL, linewidth=0)
            sheet.arrow((right - 0.14, y + 0.9), (right + GAP + 0.1, y + 0.9), color=TRAVEL)


def _timeline(sheet: Sheet) -> None:
    """Draw one linear layer, forward and then backward, with the launch and the wait of each gather.

    Backward mirrors forward, but launch and wait keep their order in time.
    """
    title = "One linear layer on one rank: its gather travels while the intra-chunk work is done"
    between, tall, left, compute, network = 0.3, 0.42, 0.85, 1.36, 0.69
    unit = (WIDTH - left - MARGIN - between) / (2 * sum(length for _, length, _ in PHASES.values()))
    sheet.text(MARGIN, 2.31, title, **TITLE)
    sheet.text(MARGIN, compute + tall / 2, "computes")
    sheet.text(MARGIN, network + 0.14, "in flight")
    sheet.text(MARGIN, network - 0.14, "time", size=8)
    sheet.arrow((left, network - 0.14), (WIDTH - MARGIN, network - 0.14), color="0.45", linewidth=0.8)
    sheet.text(MARGIN, network - 0.3, FOLD, size=8, va="top")
    for way, (phases, gathers) in WAYS.items():
        sheet.text(left, compute + tall + 0.13, way, size=8.5)
        for phase in phases:
            words, length, colour = PHASES[phase]
            right = left + length * unit
            sheet.box(left, compute, right - left, tall, words, facecolor=colour, size=8)
            if phase == "intra":
                arrived = left + 0.88 * length * unit
                sheet.box(left, network, arrived - left, 0.28, gathers, **MESSAGE)
                sheet.arrow((left, compute), (left, network + 0.28))
                sheet.text(left + 0.06, (compute + network + 0.28) / 2, "launch", size=8)
                sheet.line([(arrived, network + 0.14), (right, network + 0.14)], color=TRAVEL)
                sheet.arrow((right, network + 0.14), (right, compute), color=TRAVEL)
                sheet.text(right + 0.06, (compute + network + 0.28) / 2, "wait", size=8)
            left = right
        left += between
