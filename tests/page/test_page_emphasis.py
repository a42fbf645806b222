"""Bold, italics and struck words of answers beside Chinese, Japanese and Korean, whole and while they stream in."""

import random
import re

import pytest

from browsing import needs_browser

pytestmark = needs_browser

ENDS = """texts => texts.map(text => {          // of each text: its HTML when it grew, and when it was drawn at once
    const [grown, whole] = [0, 1].map(() => new Markdown.View(document.createElement("div")));
    for (let end = 0; end < text.length; end++) grown.update(text.slice(0, end));
    grown.update(text, true);
    whole.update(text, true);
    return [grown, whole].map(({root}) => root.innerHTML);
})"""


def html_of(page, *texts):
    """The HTML of each text, drawn as a paragraph; it is the same however the text arrived."""
    found = []
    for grown, whole in page.evaluate(ENDS, list(texts)):
        assert grown == whole
        found.append(whole.removeprefix('<p dir="auto">').removesuffix("</p>"))
    return found


BESIDE_CJK = {
    # text: what becomes of it, with the marks of bold **, italics * and struck ~~ as <b>, <i> and <s>
    "これは**「重要」**と言う。": "これは<b>「重要」</b>と言う。",
    "**「A」**と**「B」**の間": "<b>「A」</b>と<b>「B」</b>の間",
    "前**（全角）**後**（も）**終": "前<b>（全角）</b>後<b>（も）</b>終",
    "**概要：**このように": "<b>概要：</b>このように",
    "**概要:**このように": "<b>概要:</b>このように",
    "**東京(Tokyo)**は首都": "<b>東京(Tokyo)</b>は首都",
    "他说**“你好”**然后**‘再见’**。": "他说<b>“你好”</b>然后<b>‘再见’</b>。",
    "使用**`map()`**和**`filter()`**方法": "使用<b><c>map()</c></b>和<b><c>filter()</c></b>方法",
    "这是**[链接](https://example.org/a)**吗": "这是<b><a>链接</a></b>吗",
    "**말하기(speak)**는 **'듣기'**와 다르다": "<b>말하기(speak)</b>는 <b>'듣기'</b>와 다르다",
    "**「한국어」**는": "<b>「한국어」</b>는",
    "**。**句点も**、**読点も": "<b>。</b>句点も<b>、</b>読点も",
    "*「斜体」*と*（これ）*です": "<i>「斜体」</i>と<i>（これ）</i>です",
    "***「両方」***と": "<i><b>「両方」</b></i>と",
    "~~「古い」~~と~~（値）~~です": "<s>「古い」</s>と<s>（値）</s>です",
    "**外*「内」*外**です": "<b>外<i>「内」</i>外</b>です",
    "**完了！**次は**失敗？**です": "<b>完了！</b>次は<b>失敗？</b>です",
    "**50%**の人が**$5**を払う": "<b>50%</b>の人が<b>$5</b>を払う",
    "ﾊﾝｶｸ**「ｶﾅ」**ﾃﾞｽ": "ﾊﾝｶｸ<b>「ｶﾅ」</b>ﾃﾞｽ",
    "**𠮷野家。**𠮷の字": "<b>𠮷野家。</b>𠮷の字",
    # what is no emphasis stays as it is
    "2*3は6、4*5は20ではない**": "2<i>3は6、4</i>5は20ではない**",
    "これは _強調_ と snake_case_名前 です": "これは <i>強調</i> と snake_case_名前 です",
    "** 「空白」 **と": "** 「空白」 **と",
    "所要3~5天，费用10~20元": "所要3~5天，费用10~20元",
    "it costs 5~10 and 6~12, ~~not~~ ~less~": "it costs 5~10 and 6~12, <s>not</s> <s>less</s>",
    "**「開いたまま": "**「開いたまま",
    "全角＊星＊です": "全角＊星＊です",
}


@pytest.mark.parametrize("text", BESIDE_CJK)
def test_marks_beside_cjk_are_drawn(opened_page, text):
    html, = html_of(opened_page, text)
    for tag, short in (("strong", "b"), ("em", "i"), ("del", "s"), ("code", "c")):
        html = html.replace(f"<{tag}>", f"<{short}>").replace(f"</{tag}>", f"</{short}>")
    html = html.replace('<a href="https://example.org/a" target="_blank" rel="noopener noreferrer">', "<a>")
    assert html == BESIDE_CJK[text]


def test_open_bold_beside_cjk_is_bold_while_it_grows(opened_page):
    assert opened_page.evaluate("""text => {
        const view = new Markdown.View(document.createElement("div"));
        view.update(text);
        return view.root.innerHTML;
    }""", "これは**「重要") == '<p dir="auto">これは<strong>「重要</strong></p>'


def test_random_marks_lose_no_words(opened_page):
    chance = random.Random(120)
    pieces = ["*", "**", "***", "_", "~~", "「", "」", "漢字", "かな", "한", "a", " ", ".", "(", ")", "“", "”", "。"]
    texts = ["x" + "".join(chance.choices(pieces, k=chance.randrange(2, 20))).strip() + "x" for _ in range(300)]
    unmarked = [re.sub(r"[*_~]|</?(?:strong|em|del)>", "", html) for html in html_of(opened_page, *texts)]
    assert unmarked == [re.sub(r"[*_~]", "", text) for text in texts]


@pytest.mark.parametrize("text, tags", [
    # CommonMark's own examples 411, 417, 469 and 470, and marks that do not pair
    ("*foo**bar**baz*", "<em>foo<strong>bar</strong>baz</em>"),
    ("foo***bar***baz", "foo<em><strong>bar</strong></em>baz"),
    ("*foo _bar* baz_", "<em>foo _bar</em> baz_"),
    ("*foo __bar *baz bim__ bam*", "<em>foo <strong>bar *baz bim</strong> bam</em>"),
    ("***「a** b*漢", "<em><strong>「a</strong> b</em>漢"),
    ("_(bar)_.", "<em>(bar)</em>."),
    ("пристаням_стремятся_", "пристаням_стремятся_")])
def test_marks_pair_as_commonmark_says(opened_page, text, tags):
    assert html_of(opened_page, text) == [tags]
