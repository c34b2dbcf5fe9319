"""What the figures share: colours, markers, axes, the legend's place."""

# Okabe and Ito's colours, told apart by the colour-blind; marker and line tell them apart in grey
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", "--", "-.", ":")


def axes(wide: float = 7.2, columns: int = 1):
    """(figure, axes), the axes a tuple where there are several side by side."""
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=(wide, 4.4), layout="constrained")


def legend(figure, axes) -> None:
    """Outside the axes, so that it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=3 if len(labels) > 6 else 2, fontsize=8, frameon=False
        )
