"""What the notebook shows: own or published results, one user under every arm, and pickers."""

import html
import re
import shlex
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.special import expit

from data.baselines import film_counts
from data.errors import UserError, printable
from data.figures import CAPTIONS, arm_name
from data.files import read_json
from data.measures import SCHEMA_VERSION
from data.pairs import ORDERS, Pair, PairsError, other_letter, preference_rows, recommended
from data.predictions import margins_by_user, read_predictions

BEING_WRITTEN = "… (being written)"  # in place of an answer
MARKS = {True: ("✓ right", "#00704f"), False: ("✗ wrong", "#b04a00")}  # white on these is read by everybody
PUBLISHED = (Path("docs/results"), Path("docs/results/small"))


def or_say(call: Callable[..., Any], *arguments: Any) -> Any:
    """What the call returns; where the user must fix something first, None, and what and how is printed."""
    try:
        return call(*arguments)
    except (UserError, PairsError, ImportError, OSError) as error:  # ipywidgets may not be installed
        print(printable(str(error)))
        return None


def results_folder(evaluation: Path) -> Path:
    """This folder if it holds an evaluation, else that of the published experiment."""
    return next(folder for folder in (evaluation, *PUBLISHED) if (folder / "metrics.json").is_file())


def read_results(folder: Path) -> tuple[dict[str, Any], pd.DataFrame | None]:
    """(metrics.json, rows of predictions.csv or predictions.csv.gz; None where neither is there).

    Raises:
        UserError: they are of another version.
    """
    metrics = read_json(folder / "metrics.json")
    if metrics.get("schema_version") != SCHEMA_VERSION:
        places = ["--from_predictions", f"{folder}/predictions.csv", "--outputs", str(folder.parent)]
        command = f"python evaluate_dpo.py {shlex.join(places)}"
        raise UserError(f"{folder}/metrics.json is of another version", f"Make it again with: {command}")
    files = [path for name in ("predictions.csv", "predictions.csv.gz") if (path := folder / name).is_file()]
    return metrics, read_predictions(files[0]) if files else None


def picture(figure: Any, name: str) -> None:
    """Display a figure, and below it what it shows: JupyterLab takes no alternative text, nbconvert does."""
    from IPython.display import Markdown, display

    display(figure, metadata={"image/png": {"alt": CAPTIONS[name]}})
    display(Markdown(f"*{CAPTIONS[name]}.*"))


# -------------------------------------------------------------------------------------------------- the data

def films_of(pairs: Sequence[Pair], train: Sequence[Pair]) -> pd.DataFrame:
    """One row per film of each pair: its role, title, genres, and how many training users watched it."""
    watched = film_counts(train)
    roles = {"preferred film": [pair.preferred for pair in pairs], "other film": [pair.other for pair in pairs]}
    rows = [(role, film.title, film.genres, watched[film.title]) for role, films in roles.items() for film in films]
    return pd.DataFrame(rows, columns=["role", "title", "genres", "watched"])


def described(pairs: Sequence[Pair], train: Sequence[Pair], option_order: str, seed: int) -> dict[str, str]:
    """What pairs are, in numbers; option_order and seed: how models are shown them."""

    def percent(answers: Iterable[bool]) -> str:
        return f"{100 * pd.Series(list(answers)).mean():.1f}"

    films, watched = films_of(pairs, train), film_counts(train)
    own = {*train}  # whose users made the preferred film more popular by one
    popularity = [(watched[pair.preferred.title] - (pair in own), watched[pair.other.title]) for pair in pairs]
    letters = [recommended(row["chosen"]) for row in preference_rows(pairs, option_order, seed)]
    return {
        "pairs": f"{len(pairs):,}",
        "users": f"{len({pair.user_id for pair in pairs}):,}",
        "different films as options": f"{films['title'].nunique():,}",
        "genres per film, mean": f"{films['genres'].str.len().mean():.2f}",
        "preferred film is Option A in the file, %": percent(pair.order == "A" for pair in pairs),
        "preferred film is Option A as models see it, %": percent(letter == "A" for letter in letters),
        "preferred film is the more popular one, %": percent(preferred > other for preferred, other in popularity),
    }


def example_of(pairs: Sequence[Pair]) -> Pair:
    """The first pair whose two films share no genre; the first one where every pair's do."""
    return next((pair for pair in pairs if not {*pair.preferred.genres} & {*pair.other.genres}), pairs[0])


# -------------------------------------------------------------------------------------------------- one user

def choices(arm: str, pair: Pair, decision: Sequence[float]) -> pd.DataFrame:
    """One row per order: what an arm recommends, with an empty `answer`.

    decision: decision margins in nats, (orders A and B). A row holds its own as `margin`, and as `probability` that
    of the letter that it recommends, p(letter) / (p(A) + p(B)).
    """
    rows = []
    for order, margin in zip(ORDERS, decision, strict=True):
        letter = order if margin > 0 else other_letter(order)
        film = pair.preferred if margin > 0 else pair.other
        row = {"arm": arm, "order": order, "letter": letter, "film": film.title, "margin": margin}
        rows.append(row | {"probability": float(expit(abs(margin))), "answer": ""})
    return pd.DataFrame(rows)


def first_runs(predictions: pd.DataFrame) -> pd.DataFrame:
    """The rows of each arm's first run, by its seed."""
    return predictions[predictions["seed"] == predictions.groupby("arm")["seed"].transform("min")]


def recorded_choices(predictions: pd.DataFrame, pair: Pair) -> pd.DataFrame:
    """What each model made of one pair when it was evaluated (the arm's first seed), without answers."""
    rows = first_runs(predictions)
    rows = rows[(rows["pair_id"] == pair.pair_id) & (rows["history"] == "own")]
    rows = rows[rows["kind"] == "model"].sort_values("order", kind="stable")
    parts = [choices(arm, pair, found["decision_margin"]) for arm, found in rows.groupby("arm", sort=False)]
    return pd.concat(parts, ignore_index=True)


def choices_html(pair: Pair, rows: pd.DataFrame, genres: re.Pattern[str], known: bool = True) -> str:
    """One pair and the rows of `choices` as HTML; all text of others is escaped.

    In an answer, genres of the film that it recommends are bold, any other genre is underlined.
    known: the preferred film was watched next; if not, it is only the first of two.
    """

    def named(film: str, extra: str = "") -> str:
        mark, colour = MARKS[film == pair.preferred.title]
        style = f"background-color:{colour}; color:white; white-space:nowrap"
        badge = f' <b style="{style}">&nbsp;{mark}&nbsp;</b>' if known else ""
        return html.escape(film) + extra + badge

    first, second = ("the film watched next", "the other film") if known else ("film 1", "film 2")
    left = "text-align:left; vertical-align:top"
    lines = ["<p><b>history</b>: " + "; ".join(map(html.escape, pair.history)) + "</p>"]
    for role, film in ((first, pair.preferred), (second, pair.other)):
        lines.append(f"<p><b>{role}</b>: {html.escape(str(film))}</p>")
    lines.append('<table style="width:100%; table-layout:fixed"><tr><th style="width:7em"></th>')
    lines += [f'<th style="{left}">with {first} as Option {order}</th>' for order in ORDERS]
    lines.append(f'<th style="{left}; width:11em">both orders together</th>')
    for arm, found in rows.groupby("arm", sort=False):
        lines.append(f'</tr><tr><td style="{left}"><b>{html.escape(arm_name(arm))}</b></td>')
        for row in found.itertuples():
            shown = {row.order: pair.preferred, other_letter(row.order): pair.other}
            says = recommended(row.answer)
            answer = marked(row.answer, set(shown[says].genres) if says else set(), genres)
            film = named(row.film, f" (p = {row.probability:.2f})")
            lines.append(f'<td style="{left}"><b>{row.letter}</b>: {film}<br>{answer}</td>')
        both = pair.preferred if found["margin"].sum() > 0 else pair.other
        lines.append(f'<td style="{left}">{named(both.title)}</td>')
    return '<div class="tex2jax_ignore">' + "\n".join([*lines, "</tr></table>"]) + "</div>"


def marked(text: str, own: set[str], genres: re.Pattern[str]) -> str:
    """Text as HTML, ↵ for an end of line, with its genres marked: bold where among `own`, underlined otherwise."""
    shown = ""
    for number, piece in enumerate(re.split(f"({genres.pattern})", re.sub(r"\s*\n\s*", " ↵ ", text.strip()))):
        tag = "b" if piece in own else "u"  # every second piece is a genre
        shown += f"<{tag}>{html.escape(piece)}</{tag}>" if number % 2 else html.escape(piece)
    return shown


# ---------------------------------------------------------------------------------------------------- pickers

def user_groups(test: Sequence[Pair], predictions: pd.DataFrame | None, live: bool) -> dict[str, list[str]]:
    """pair_ids of the test users who can be shown, by what the arms made of them; live: the arms are loaded.

    Orders are taken together, of each arm's first run; the clearest disagreement comes first. All are sorted by name.
    """
    recorded = set() if predictions is None else set(predictions["pair_id"])
    by_title = sorted(test, key=lambda pair: pair.preferred.title)
    shown = [pair.pair_id for pair in by_title if live or pair.pair_id in recorded]
    groups = {"all test users": shown, "SFT right, DPO wrong": [], "DPO right, SFT wrong": []}
    margins = pd.DataFrame() if predictions is None else margins_by_user(first_runs(predictions))
    for right, wrong in (("sft", "dpo"), ("dpo", "sft")) if {"sft", "dpo"} <= set(margins) else ():
        found = margins[(margins[right] > 0) & (margins[wrong] < 0) & margins.index.isin(shown)]
        by_clearness = (found[wrong] - found[right]).sort_values(kind="stable")
        groups[f"{right.upper()} right, {wrong.upper()} wrong"] = list(by_clearness.index)
    return groups


def user_names(test: Sequence[Pair]) -> dict[str, str]:
    """What to call each user, by pair_id: the film watched next, numbered where several watched the same one."""
    titles = pd.Series({pair.pair_id: pair.preferred.title for pair in test}, dtype=str)
    numbers = titles.groupby(titles).cumcount() + 1
    return titles.where(numbers == 1, titles + ", user " + numbers.astype(str)).to_dict()


def newest_in(area: Any, pages: Callable[..., Iterable[str]]) -> Callable[..., threading.Thread]:
    """A function that shows pages(...), of HTML, one by one in an Output widget; called again, it ends the older call.

    It works in a thread of its own: JupyterLab handles one message of a widget after another, so that a second pick
    would wait until all of the first is written.
    """
    lock, calls = threading.Lock(), list[object]()

    def put(call: object, page: str) -> bool:
        with lock:
            if newest := calls[-1] is call:
                area.outputs = ({"output_type": "display_data", "data": {"text/html": page}, "metadata": {}},)
        return newest

    def work(call: object, arguments: tuple[Any, ...]) -> None:
        try:
            for page in pages(*arguments):
                if not put(call, page):
                    return
        except Exception as error:  # nobody sees what a thread raises
            name = "" if isinstance(error, UserError | PairsError) else f"{type(error).__name__}: "
            put(call, f"<pre>{html.escape(name + printable(str(error)))}</pre>")

    def show(*arguments: Any) -> threading.Thread:
        call = object()
        with lock:
            calls[:] = [call]
        put(call, BEING_WRITTEN)
        thread = threading.Thread(target=work, args=(call, arguments), daemon=True)
        thread.start()
        return thread

    return show


def user_picker(
    pages: Callable[[str], Iterable[str]], groups: dict[str, list[str]], names: dict[str, str], first: str
) -> Any:
    """A widget to choose a group of users and one of them; the HTML of pages(pair_id) stands below.

    groups: pair_ids by a group's name, the first group that of all users; first: the one who is shown at the start.
    """
    import ipywidgets as widgets

    by_group = {name: [(names[user], user) for user in users] for name, users in groups.items() if users}
    options = [(f"{name} ({len(users):,})", users) for name, users in by_group.items()]
    group = widgets.Dropdown(description="users", options=options)
    wide = {"layout": widgets.Layout(width="32em"), "style": {"description_width": "initial"}}
    user = widgets.Dropdown(description="watched next", options=group.value, value=first, **wide)
    area = widgets.Output()
    show = newest_in(area, pages)
    group.observe(lambda change: setattr(user, "options", change["new"]), "value")
    user.observe(lambda change: show(change["new"]), "value")
    show(user.value)
    return widgets.VBox([widgets.HBox([group, user]), area])


def own_pair_box(pages: Callable[..., Iterable[str]], history: Sequence[str], *two_films: tuple[str, str]) -> Any:
    """A widget to write a history and two films, beginning with those given; the HTML of pages(...) stands below."""
    import ipywidgets as widgets

    wide = {"layout": widgets.Layout(width="40em"), "style": {"description_width": "8em"}}
    titles = widgets.Textarea("\n".join(history), description="five films", rows=len(history) + 1, **wide)
    films = []
    for number, (title, genres) in enumerate(two_films, start=1):
        films.append(widgets.Text(title, description=f"film {number}", **wide))
        films.append(widgets.Text(genres, description="its genres", **wide))
    button, area = widgets.Button(description="Compare"), widgets.Output()
    show = newest_in(area, pages)

    def compare(_: Any) -> None:
        values = [field.value for field in films]
        show(titles.value.splitlines(), tuple(values[:2]), tuple(values[2:]))

    button.on_click(compare)
    return widgets.VBox([titles, *films, button, area])


def show_widget(box: Any) -> None:
    """Display a widget, or a line in its place where there is no kernel to move it."""
    from IPython.display import display

    text = {"text/plain": "Run the notebook to use the pickers: a static view cannot show them."}
    display(box._repr_mimebundle_() | text, raw=True)
