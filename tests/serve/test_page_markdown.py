"""The page's Markdown: against markdown-it, cut anywhere while it streams, and with all that tries
to be HTML.
"""

import html.parser
import random

import pytest
from browser import context, page, stub  # noqa: F401

markdown_it = pytest.importorskip(
    "markdown_it", reason="markdown-it-py (a dependency of rich) is not installed"
)

# What our renderer made of a text, as nested parentheses: a code figure is a `pre`, a heading tells
# its level.
OURS = """async ({texts, steps}) => {
  const {Markdown} = await import(location.origin + "/markdown.js");
  const name = (node) => node.className.match?.(/level-(\\d)/) ? "h" + RegExp.$1 : node.localName;
  const write = (node) => {
    if (node.nodeType === 3) return node.data;
    if (node.localName === "input") return "";
    if (node.matches("figure.code")) return "(pre " + node.querySelector("pre").textContent + ")";
    if (node.localName === "br") return "(br )";
    const inside = [...node.childNodes].map(write).join("");
    if (node.matches("div, tbody, thead, span")) return inside;
    const ordered = node.localName === "ol" && (node.getAttribute("start") ?? "1") + " ";
    const more = node.localName === "a" ? node.getAttribute("href") + " " : ordered || "";
    return "(" + name(node) + " " + more + inside + ")";
  };
  return texts.map((text) => {
    const view = new Markdown();
    for (const step of steps ?? []) view.update(text.slice(0, step), true);
    view.update(text, false);
    return write(view.element);
  });
}"""


class Writer(html.parser.HTMLParser):
    """markdown-it's HTML in the same form."""

    def __init__(self):
        super().__init__()
        self.written, self.code = "", False

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in ("tbody", "thead") or (tag == "code" and self.code):
            return
        self.code |= tag == "pre"
        tag = {"s": "del"}.get(tag, tag)
        more = {"a": given.get("href"), "ol": given.get("start", "1")}.get(tag)
        self.written += (
            f"({tag} " + (f"{more} " if more else "") + (")" if tag in ("br", "hr") else "")
        )

    def handle_endtag(self, tag):
        if tag in ("tbody", "thead", "br", "hr") or (tag == "code" and self.code):
            return
        self.code &= tag != "pre"
        self.written += ")"

    def handle_data(self, data):
        self.written += data


def theirs(text):
    parser = markdown_it.MarkdownIt("commonmark", {"html": False}).enable(
        ["table", "strikethrough"]
    )
    writer = Writer()
    writer.feed(parser.render(text))
    return writer.written


def alike(written):
    """Without the white space that no reader sees."""
    return " ".join(written.replace("(", " ( ").replace(")", " ) ").split())


CASES = [
    "# One\n\n## Two ##\n\n####### seven\n#no\n\nThree\n===\n\nFour\n---",
    "a *b* **c** ***d*** _e_ __f__ ~~g~~ snake_case_name 2*3*4 2 * 3 * 4",
    "*a **b** c* **a *b* c** **a*b** *a**b* ****a**** **unclosed *too",
    "`a` ``b ` c`` ` `` ` `unclosed \\`no\\` *a `*` b*",
    (
        '[a](https://a.b/c?d=e) [b *c*](https://a.b/x "title") [x] [y](no space here) '
        "[z](<https://a.b/c d>)"
    ),
    "<https://a.b/c> <mailto:a@b.c> &amp; &lt; &#65; &#x42; &quot; & x &nope;",
    "line one  \nline two\\\nline three\nline four",
    "- a\n- b\n  - c\n    - d\n- e\n\n* other\n* list\n\n+ third",
    "1. a\n2. b\n   1. c\n   2. d\n3. e\n\n7) seven\n8) eight",
    "- a\n\n- b\n\n  second paragraph\n\n- c\n",
    "1. a\n\n   ```py\n   x = 1\n   ```\n2. b",
    "- a\nlazy\n- b\n\npara",
    "> a\n> b\nlazy\n\n> c\n>\n> - d\n> - e\n\n> # h\n> > nested",
    "```py\ndef f():\n    return 1\n```\n\n~~~\na ``` b\n~~~\n\n````md\n```\nin\n```\n````",
    "```\nunclosed\n\nstill code",
    "para\n```\ncode right after\n```\npara right after",
    "    indented\n\n    code\n\nnot",
    "a | b\n--|--\n1 | 2\n3\n\npara",
    "| a | b | c |\n|:--|--:|:-:|\n| `x` | **y** | a \\| b |\n| 1 | 2 | 3 | 4 |\n",
    "text\n| a | b |\n|---|---|\n| 1 | 2 |\nnot after",
    "***\n---\n___\n- - -\n* * *\nnot - - -",
    "- [a](https://x.y/)\n- `b`\n- **c**: d\n\n---\n\n**Title**\n: no definition lists",
    "1986. A great year\n\nThe number is\n14. not a list\n1. but this is",
    "\\*a\\* \\[b\\] \\# c \\\\ \\a",
    "<script>alert(1)</script>\n\n<b>bold?</b> a < b > c",
    "-\n- empty before\n-\n\n*\n",
    "- a\n      code? no, a paragraph's next line\n-     code in an item\n",
    "**bold**text **bold**, **“quoted”** a**b**c _a_b_c_ (*a*) *(a)*",
    "Setext with *em*\n----------------\n\n- item\n---\nafter",
    "| no | table\n\n|a|\n|-|\n|1|",
]
LINES = [
    "plain words",
    "**bold** and *em*",
    "`code` here",
    "- item",
    "* star",
    "1. one",
    "2. two",
    "> quote",
    "# Head",
    "---",
    "",
    "",
    "```",
    "    far",
    "\n| a | b |\n|---|---|",
    "  - two in",
    "   - three in",
]


@pytest.fixture
def ours(page):  # noqa: F811
    return lambda texts, steps=None: page.evaluate(OURS, {"texts": texts, "steps": steps})


def test_as_markdown_it_reads_it(ours):
    for text, made in zip(CASES, ours(CASES)):
        assert alike(made) == alike(theirs(text)), text


def test_random_documents(ours):
    rng = random.Random(0)
    documents = ["\n".join(rng.choices(LINES, k=rng.randint(2, 9))) for _ in range(400)]
    different = [
        text for text, made in zip(documents, ours(documents)) if alike(made) != alike(theirs(text))
    ]
    assert different == []


def test_cut_anywhere_while_it_streams(ours):
    rng = random.Random(1)
    text = "\n\n".join(CASES)
    whole = ours([text])
    for _ in range(3):
        steps = sorted(rng.sample(range(len(text)), 120))
        assert ours([text], steps) == whole
    short = "A **bold _word_** and `code`, [a link](https://a.b/).\n\n```py\nx = 1\n```\n\n- a\n- b"
    assert ours([short], list(range(len(short)))) == ours([short])


def test_what_is_open_counts_as_closed_while_it_streams(page):  # noqa: F811
    show = OURS.replace("view.update(text, false);", "view.update(text, true);")
    cases = {
        "so **bold": "(p so (strong bold))",
        "so **": "(p so )",
        "a `code": "(p a (code code))",
        "see [the page](https://exa": "(p see the page)",
        "- a\n- **b": "(ul (li a)(li (strong b)))",
        "2 * 3": "(p 2 * 3)",
    }
    assert page.evaluate(show, {"texts": list(cases)}) == list(cases.values())


def test_finished_blocks_keep_their_nodes_while_more_comes(page):  # noqa: F811
    kept = page.evaluate("""async () => {
      const {Markdown} = await import(location.origin + "/markdown.js");
      const view = new Markdown();
      view.update("# A\\n\\nfirst\\n\\n```py\\nx", true);
      const [heading, paragraph, code] = view.element.children;
      const text = code.querySelector("code").firstChild;
      view.update("# A\\n\\nfirst\\n\\n```py\\nx = 1", true);
      const same = view.element.children[2] === code && code.querySelector("code").firstChild === text;
      const grown = same && text.data === "x = 1";
      view.update("# A\\n\\nfirst\\n\\n```py\\nx = 1\\n```\\n\\nlast", true);
      const [a, b, c] = view.element.children;
      return [a === heading, b === paragraph, c === code, grown];
    }""")
    assert kept == [True] * 4


def test_east_asian_emphasis_and_addresses(ours):
    cases = {
        "**通义千问：**是模型": "(p (strong 通义千问：)是模型)",
        "这是**“重点”**内容": "(p 这是(strong “重点”)内容)",
        "见 https://example.org/a。好": "(p 见 (a https://example.org/a https://example.org/a)。好)",
        "(https://a.b/c_(d))": "(p ((a https://a.b/c_(d) https://a.b/c_(d))))",
        "www.x.org": "(p (a http://www.x.org/ www.x.org))",
        "$$\na_1 * b_1\n$$": "a_1 * b_1",
        "so \\(a_1 * b_1\\) is": "(p so a_1 * b_1 is)",
        "![a cat](https://a.b/cat.png)": "(p (a https://a.b/cat.png a cat))",
    }
    assert ours(list(cases)) == list(cases.values())


INJECTIONS = [
    "<script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1">',
    "[x](javascript:window.hacked=1)",
    "[x](JaVaScRiPt:window.hacked=1) <javascript:window.hacked=1>",
    "[x](data:text/html,<script>window.hacked=1</script>)",
    (
        "[x](&#106;avascript:window.hacked=1) [x](java\tscript:window.hacked=1) [x](vbscript:x) "
        "[x](file:///etc/passwd)"
    ),
    '[x](https://a.b/"onmouseover="window.hacked=1)',
    '[x](https://a.b "\\" onmouseover=window.hacked=1")',
    '```"><script>window.hacked=1</script>\n<script>window.hacked=1</script>\n```',
    "| <script>window.hacked=1</script> |\n|---|\n| <svg onload=window.hacked=1> |",
    "![x](https://evil.example/pixel.png)",
    "<a href='javascript:window.hacked=1'>x</a> <iframe src=javascript:window.hacked=1>",
    "&lt;script&gt;window.hacked=1&lt;/script&gt;",
    "[[[[[[" * 2000 + "***" * 2000 + "`" * 3001,
    "> " * 4000 + "- " * 4000,
]


def test_text_never_becomes_html(page):  # noqa: F811
    made = page.evaluate(
        """async (texts) => {
      const {Markdown} = await import(location.origin + "/markdown.js");
      const found = [];
      for (const text of texts) {
        const view = new Markdown();
        view.update(text, true);
        view.update(text, false);
        document.body.append(view.element);
        for (const node of view.element.querySelectorAll("*")) {
          found.push([node.localName, ...[...node.attributes].map((a) => a.name + "=" + a.value)]);
        }
        view.element.querySelectorAll("a").forEach((a) => a.dispatchEvent(new MouseEvent("mouseover")));
      }
      return found;
    }""",
        INJECTIONS,
    )
    assert not page.evaluate("window.hacked")
    names = {name for name, *_ in made}
    safe = {
        "p",
        "a",
        "code",
        "pre",
        "figure",
        "figcaption",
        "span",
        "button",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
    }
    assert names <= safe | {"th", "td", "blockquote", "ul", "li", "em", "strong", "br"}
    attributes = [attribute for _, *all_ in made for attribute in all_]
    assert not [
        a
        for a in attributes
        if a.startswith("on") or a.partition("=")[0] in ("src", "style", "srcdoc")
    ]
    links = [a for a in attributes if a.startswith("href=")]
    assert links
    assert all(a.startswith("href=https://") for a in links)
    assert all("rel=noopener noreferrer nofollow" in node for node in made if node[0] == "a")
