"""The drawing of a hybrid model over four ranks: the messages of each kind of layer, and the work during them.

The upper half has four blocks, with a column for each rank. The lower half is the schedule of one linear layer
on one rank, and its mirror image in backward.
"""

from __future__ import annotations

from analysis.drawings.sheet import Sheet

RANKS = 4
WIDTH, MARGIN = 8.0, 0.12  # inches
LABEL = 1.5  # width of the column that names the blocks
GAP = 0.14  # between ranks
TALL = 1.1  # height of a block
CELL = (WIDTH - LABEL - MARGIN - GAP * (RANKS - 1)) / RANKS
LINEAR, SOFTMAX, TRAVEL, CALM = "#cfe0f1", "#f3c98b", "#14406f", "#ececec"
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
    sheet = Sheet(WIDTH, 8.46)
    _title(sheet, sheet.height - 0.2, "A hybrid model, its sequence cut over four ranks: what each kind of layer sends")
    top = sheet.height - 0.7
    _tokens(sheet, top)
    top -= 0.12
    for number, kind in enumerate("LLSL", 1):
        (_linear if kind == "L" else _softmax)(sheet, top - TALL, number)
        top -= TALL + 0.12
    sheet.text(MARGIN, top - 0.03, REST, size=8)
    _timeline(sheet, top - 0.45)
    return sheet


def description() -> str:
    """Describe the drawing in a sentence."""
    return "Blocks L L S L over four ranks, what each sends, and the schedule of a linear layer."


def _title(sheet: Sheet, y: float, words: str) -> None:
    sheet.text(MARGIN, y, words, size=10.5, weight="bold")


def _left(rank: int) -> float:
    return LABEL + rank * (CELL + GAP)


def _tokens(sheet: Sheet, y: float) -> None:
    """Draw the sequence, with a span of tokens on each rank."""
    sheet.text(MARGIN, y + 0.13, "sequence of 4 T")
    for rank, tokens in enumerate(("0 to T-1", "T to 2T-1", "2T to 3T-1", "3T to 4T-1")):
        sheet.box(_left(rank), y, CELL, 0.26, f"rank {rank}: {tokens}", facecolor=CALM, size=8.5)


def _block(sheet: Sheet, y: float, number: int, name: str, fill: str, sends: str) -> None:
    sheet.box(MARGIN - 0.06, y, WIDTH - 2 * MARGIN + 0.12, TALL, facecolor="none", edgecolor="0.7", zorder=1)
    sheet.text(MARGIN + 0.02, y + TALL - 0.2, f"block {number}", size=8)
    sheet.box(MARGIN + 0.54, y + TALL - 0.32, 0.7, 0.24, name, facecolor=fill, weight="bold", rounded=0.04, size=8.5)
    sheet.text(MARGIN + 0.02, y + 0.38, sends, size=8)


def _linear(sheet: Sheet, y: float, number: int) -> None:
    """Draw a short convolution, which reads its neighbour's last tokens, and one gather of states."""
    _block(
        sheet, y, number, "linear", LINEAR, "sends one state S of\nfixed size, and W-1\ntokens if it convolves\nover W"
    )
    for rank in range(RANKS):
        x = _left(rank)
        sheet.box(x, y + 0.78, CELL, 0.24, facecolor=CALM)
        sheet.text(x + 0.12, y + 0.9, "conv", size=8)
        sheet.box(x, y + 0.42, CELL, 0.29, facecolor=LINEAR)
        sheet.text(x + 0.12, y + 0.565, "recurrence", size=8)
        sheet.box(x + CELL - 0.42, y + 0.46, 0.34, 0.21, f"$S_{rank}$", size=8.5)
        _both_ways(sheet, x + CELL - 0.25, y + 0.42)
        if rank < RANKS - 1:
            edge = x + CELL - 0.14
            sheet.text(edge - 0.05, y + 0.9, "last W-1", size=7.5, ha="right")
            sheet.box(edge, y + 0.81, 0.1, 0.18, facecolor=TRAVEL, linewidth=0)
            sheet.arrow((edge, y + 0.9), (x + CELL + GAP + 0.1, y + 0.9), color=TRAVEL)
    _bus(
        sheet, y, "AllGather of S, with decays that depend on data: the same size at any T.  Backward: AllGather of dS"
    )


def _softmax(sheet: Sheet, y: float, number: int) -> None:
    """Draw one gather of all keys and values."""
    _block(sheet, y, number, "softmax", SOFTMAX, "sends K and V of\nall its T tokens")
    for rank in range(RANKS):
        x = _left(rank)
        sheet.box(x, y + 0.42, CELL, 0.6, facecolor=SOFTMAX)
        sheet.text(x + 0.12, y + 0.91, "attention", size=8)
        for name, place in (("K", 0.64), ("V", 0.46)):
            sheet.box(x + 0.08, y + place, CELL - 0.16, 0.16, f"${name}_{rank}$", size=8)
        _both_ways(sheet, x + CELL - 0.25, y + 0.42)
    _bus(sheet, y, "AllGather of keys and values: its size grows with T.  Backward: ReduceScatter of dK and dV")


def _both_ways(sheet: Sheet, x: float, y: float) -> None:
    """Draw an arrow between a rank and the bus below it."""
    sheet.arrow((x, y), (x, y - 0.14), arrowstyle="<|-|>", mutation_scale=6, zorder=4)


def _bus(sheet: Sheet, y: float, words: str) -> None:
    """Draw the collective that joins all ranks of a block."""
    width = WIDTH - LABEL - MARGIN
    sheet.box(LABEL, y + 0.07, width, 0.21, words, facecolor=TRAVEL, color="white", size=8, linewidth=0)


def _timeline(sheet: Sheet, y: float) -> None:
    """Draw one linear layer, forward and then backward, with the launch and the wait of each gather.

    Backward mirrors forward, but launch and wait keep their order in time.
    """
    _title(sheet, y, "One linear layer on one rank: its gather travels while the intra-chunk work is done")
    between, tall, left = 0.3, 0.42, 0.85
    unit = (WIDTH - left - MARGIN - between) / (2 * sum(length for _, length, _ in PHASES.values()))
    compute, network = y - 0.95, y - 1.62
    sheet.text(MARGIN, compute + tall / 2, "computes")
    sheet.text(MARGIN, network + 0.14, "in flight")
    x = left
    for way, (names, gathered) in WAYS.items():
        sheet.text(x, compute + tall + 0.13, way, size=8.5)
        for name in names:
            words, length, fill = PHASES[name]
            sheet.box(x, compute, length * unit, tall, words, facecolor=fill, size=8)
            if name == "intra":
                flight = 0.88 * length * unit
                sheet.box(x, network, flight, 0.28, gathered, facecolor=TRAVEL, linewidth=0, size=8, color="white")
                sheet.arrow((x, compute), (x, network + 0.28))
                sheet.text(x + 0.06, (compute + network + 0.28) / 2, "launch", size=8)
                sheet.line([(x + flight, network + 0.14), (x + length * unit, network + 0.14)], color=TRAVEL)
                sheet.arrow((x + length * unit, network + 0.14), (x + length * unit, compute), color=TRAVEL)
                sheet.text(x + length * unit + 0.06, (compute + network + 0.28) / 2, "wait", size=8)
            x += length * unit
        x += between
    sheet.arrow((left, network - 0.14), (WIDTH - MARGIN, network - 0.14), color="0.45", linewidth=0.8)
    sheet.text(MARGIN, network - 0.14, "time", size=8)
    sheet.text(MARGIN, network - 0.3, FOLD, size=8, va="top")
