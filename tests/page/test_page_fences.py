"""Code blocks that hold code blocks: which fence closes which, in answers, whole and streamed, and in questions."""

import pytest

from browsing import needs_browser

pytestmark = needs_browser

BLOCKS_OF = """text => {           // [language, code] of each block and the text of each other one: grown, and at once
    const [grown, whole] = [0, 1].map(() => new Markdown.View(document.createElement("div")));
    for (let end = 0; end < text.length; end++) grown.update(text.slice(0, end));
    grown.update(text, true);
    whole.update(text, true);
    const blocks = ({root}) => [...root.querySelectorAll(":is(.code, p, h1, h2)")].map(each => each.matches(".code")
        ? [each.querySelector("span").textContent, each.querySelector("code").textContent] : each.textContent);
    return [blocks(grown), blocks(whole), grown.root.innerHTML === whole.root.innerHTML];
}"""

README = "# Title\n\n```python\nprint(1)\n```\n\nThen:\n\n```bash\nls\n```\n\nEnd of it\n"
PROMPT = 'PROMPT = """Answer with\n```json\n{}\n```\n"""\n'
HELD = {
    # what an answer says: the blocks it has
    "longer marks": (f"So:\n\n````markdown\n{README}````\n\nafter", ["So:", ["markdown", README], "after"]),
    "an info string opens": (f"So:\n\n```markdown\n{README}```\n\nafter", ["So:", ["markdown", README], "after"]),
    "tildes": (f"~~~md\n{README.replace('```', '~~~')}~~~\nafter", [["md", README.replace("```", "~~~")], "after"]),
    "other marks within": (f"~~~md\n{README}~~~\nafter", [["md", README], "after"]),
    "no language": (f"```\n{README}```\nafter", [["text", README], "after"]),
    "a prompt in a program": (f"```python\n{PROMPT}```\nafter", [["python", PROMPT], "after"]),
    "three levels": ("```md\n```md\n```js\n1\n```\n2\n```\n3\n```\nafter", [["md", "```md\n```js\n1\n```\n2\n```\n3\n"], "after"]),
    "longer marks at each level": ("`````md\n````md\n```js\n1\n```\n````\n`````\nafter",
                                   [["md", "````md\n```js\n1\n```\n````\n"], "after"]),
    "in a list within": ("```md\n1. Run\n   ```sh\n   ls\n   ```\n- ```sh\n  ls\n  ```\n```\nafter",
                         [["md", "1. Run\n   ```sh\n   ls\n   ```\n- ```sh\n  ls\n  ```\n"], "after"]),
    "in a quote within": ("```md\n> ```sh\n> ls\n> ```\n\n```\nafter", [["md", "> ```sh\n> ls\n> ```\n\n"], "after"]),
    "in a list": (f"- one\n\n  ```markdown\n  {README.replace(chr(10), chr(10) + '  ').rstrip()}\n  ```\n\n  two",
                  ["one", ["markdown", README], "two"]),
    "in a quote": ("> ```md\n> ```sh\n> ls\n> ```\n> x\n> ```\n> y\n\nz", [["md", "```sh\nls\n```\nx\n"], "y", "z"]),
    "attributes": ("```md\n```js {1,3} title=\"a\"\n1\n```\n```\nafter", [["md", "```js {1,3} title=\"a\"\n1\n```\n"], "after"]),
    # a document that was cut off is one block; elsewhere a block that nobody closed was not closed by mistake
    "cut off in it": ("```markdown\n# A\n\n```sh\nls\n```\n\nmore", [["markdown", "# A\n\n```sh\nls\n```\n\nmore\n"]]),
    "cut off in the inner": ("```markdown\n# A\n\n```sh\nls", [["markdown", "# A\n\n```sh\nls\n"]]),
    "a forgotten end": ("```python\nprint(1)\n```bash\nls\n```\n\nafter\n\n```js\n1\n```\nend",
                        [["python", "print(1)\n```bash\nls\n"], "after", ["js", "1\n"], "end"]),
    "a fence too many": ("```python\n1\n```\n```\n\nbetween\n\n```python\n2\n```\n\nafter",
                         [["python", "1\n"], ["text", "\nbetween\n\n```python\n2\n"], "after"]),
    "a forgotten end behind a document": (f"```md\n{README}```\nso\n```sh\n1\n```sh\n2\n```\nend",
                                          [["md", README], "so", ["sh", "1\n```sh\n2\n"], "end"]),
    # no fences
    "words behind marks": ("```sh\n``` is how a block begins\n```\nafter", [["sh", "``` is how a block begins\n"], "after"]),
    "shorter marks": ("````\n```\n````\nafter", [["text", "```\n"], "after"]),
    "a docstring": ('```python\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\n```\nafter',
                    [["python", 'def f():\n    """\n    ```\n    f()\n    ```\n    """\n'], "after"]),
}


@pytest.mark.parametrize("name", HELD)
def test_a_block_of_code_holds_blocks(opened_page, name):
    text, blocks = HELD[name]
    grown, whole, same = opened_page.evaluate(BLOCKS_OF, text)
    assert whole == blocks
    assert grown == blocks and same


@pytest.mark.parametrize("name", ["an info string opens", "a forgotten end", "longer marks", "a fence too many"])
def test_a_question_s_blocks_are_those_of_an_answer(opened_page, name):
    text, blocks = HELD[name]
    found = opened_page.evaluate("""text => Turns.questionNodes(text).filter(each => each.nodeType).map(
        each => [each.querySelector("span").textContent, each.querySelector("code").textContent])""", text)
    assert found == [[language, code.removesuffix("\n")] for language, code in (each for each in blocks if isinstance(each, list))]


def test_a_held_block_is_one_block_while_it_grows(opened_page):
    text = HELD["an info string opens"][0]
    assert opened_page.evaluate("""text => {
        const view = new Markdown.View(document.createElement("div"));
        let most = 0;
        for (let end = 0; end < text.length; end++) {
            view.update(text.slice(0, end));
            most = Math.max(most, view.root.querySelectorAll(".code").length);
        }
        return most;
    }""", text) == 1


EACH_END = """text => {          // the beginnings of a text that are drawn differently when they grow and end than at once
    const drawn = (said, step) => {
        const view = new Markdown.View(document.createElement("div"));
        for (let end = 0; end < said.length; end += step) view.update(said.slice(0, end));
        view.update(said, true);
        return view.root;
    };
    const wrong = [];
    for (let end = 1; end <= text.length; end++) {
        const said = text.slice(0, end), [grown, whole] = [drawn(said, 5), drawn(said, Infinity)];
        if (!grown.isEqualNode(whole)) wrong.push(said);
    }
    return wrong;
}"""


@pytest.mark.parametrize("text", [
    "前**「太字」**と*（斜体）*で~~「消」~~。\n\n```md\n**「x」**\n```js\n1\n```\n```\n> [!TIP]\n> **「y」**と\n> ```sh\n> z\n> ```\n\nend",
    "[a] ```md\n\n```python\n1\n```js\n2\n```\n\n[a]: https://example.org\n\n**「b」**と**「c」** [a]"], ids=["all", "mistaken"])
def test_any_beginning_may_be_the_end(opened_page, text):
    assert opened_page.evaluate(EACH_END, text) == []
