"""Draws triangle.svg next to itself: how products over token ranges cover the lower triangle of a chunk."""

from pathlib import Path

C = 16
CELL = 30
LEFT, TOP = 78, 78  # the corner of the matrix
RIGHT = LEFT + C * CELL + 36  # where the legend begins
WIDTH, HEIGHT = 960, TOP + C * CELL + 26
INK, QUIET = "#1f2933", "#52606d"
DIAGONAL = "#d5dae1"
LEVELS = {1: "#fbe08b", 2: "#f7b27a", 4: "#8ed3b5", 8: "#9dbdf0"}  # s: its colour


def text(x, y, words, size=14, anchor="start", fill=INK, extra=""):
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{fill}"'
    return f'<text x="{x}" y="{y}" {style}{" " * bool(extra)}{extra}>{words}</text>'


def square(x, y, side, fill, stroke="#ffffff"):
    return f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="{fill}" stroke="{stroke}"/>'


def block(i, j, s, fill, label):
    """The s x s block whose first row is i and first column j, both counted from 0."""
    x, y, side = LEFT + j * CELL, TOP + i * CELL, s * CELL
    size = {1: 11, 2: 15, 4: 20, 8: 28}[s]
    return [
        square(x, y, side, fill),
        text(x + side / 2, y + side / 2 + 0.35 * size, label, size, "middle"),
    ]


def matrix():
    for t in range(C):
        middle = t * CELL + CELL / 2
        yield text(LEFT + middle, TOP - 10, t + 1, 12, "middle", QUIET)
        yield text(LEFT - 10, TOP + middle + 4, t + 1, 12, "end", QUIET)
        yield from block(t, t, 1, DIAGONAL, "")
    for s, fill in LEVELS.items():
        for middle in range(s, C, 2 * s):  # the first token of a pair's second block
            yield from block(middle, middle - s, s, fill, f"s={s}")
    center = C * CELL / 2
    yield text(LEFT + center, 36, "column j: the key token", 15, "middle")
    x, y = 28, TOP + center
    yield text(x, y, "row i: the query token", 15, "middle", extra=f'transform="rotate(-90 {x} {y})"')
    yield text(LEFT + 11.2 * CELL, TOP + 3.6 * CELL, "j &gt; i: zero, no score computed", 13, "middle", QUIET)
    yield square(LEFT, TOP, C * CELL, "none", QUIET)


def legend():
    y = TOP + 14
    yield text(RIGHT, y, f"The triangle of a chunk, C = {C}", 18, extra='font-weight="bold"')
    rows = [(DIAGONAL, "i = j", "D(i←i) = 1, no decay")]
    for s, fill in LEVELS.items():
        n = C // (2 * s)
        rows.append((fill, f"s = {s}", f"{n} block{'s' * (n > 1)} of {s} × {s}"))
    for fill, name, what in rows:
        y += 38
        yield square(RIGHT, y - 17, 24, fill, QUIET)
        yield text(RIGHT + 38, y, name, 15)
        yield text(RIGHT + 100, y, what, 15)
    y += 56
    yield text(RIGHT, y, "One level is one batched product:", 15, extra='font-weight="bold"')
    for line in ("rows of the second block", "× columns of the first,", "for each pair of neighbours."):
        y += 24
        yield text(RIGHT, y, line, 15)
    y += 44
    yield text(RIGHT, y, "The blocks of a pair meet at m, and there", 15)
    for line in ("D(i←j) = D(i←m) · D(m←j)", "rows_i = x_i · D(i←m), x = q, k", "cols_j = k_j · D(m←j)"):
        y += 26
        yield text(RIGHT + 16, y, line, 15, extra='font-family="monospace"')


def main():
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
    head += f'height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif" role="img">'
    title = "<title>How products over token ranges cover the lower triangle of a chunk</title>"
    sheet = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    lines = [head, title, sheet, *matrix(), *legend(), "</svg>"]
    Path(__file__).with_name("triangle.svg").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
