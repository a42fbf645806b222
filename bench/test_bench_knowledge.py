"""The scripts that measure knowledge: their set of questions, their marks, and all of bench/knowledge_scale.py, small."""

import pytest

import knowledge_answers
import knowledge_held_out
import knowledge_scale


def test_each_answer_stands_in_one_place():
    texts = dict(knowledge_held_out.documents())
    questions = knowledge_held_out.questions()
    assert len(texts) == 26 and len(questions) == 130
    for question in questions:
        assert texts[question.file].count(question.answer) == 1
        assert sum(question.answer in text for text in texts.values()) == 1
        assert question.is_said_in(question.answer), question


def test_a_model_is_asked_forty_questions_whose_answers_stand_in_one_document():
    documents, questions = knowledge_held_out.asked_of_models()
    assert len(documents) == 20 and len(questions) == 40
    for question in questions:
        assert [file for file, text in documents if question.is_said_in(text)] == [question.file]


class Answering:
    """Stands in for a server that answers so, of three passages."""

    def __init__(self, text, question, found=True):
        self.text, self.question, self.found = text, question, found

    def post(self, path, body):
        place = dict(knowledge_held_out.documents())[self.question.file].index(self.question.answer)
        passages = [{"filename": "boiler.md", "start": 0}, {"filename": self.question.file, "start": place - 10 if self.found else place + 400}]
        return {"choices": [{"message": {"content": self.text}}], "usage": {"prompt_tokens": 100},
                "knowledge": {"mode": "search", "passages": passages}}


@pytest.mark.parametrize("text, found, marks", [
    ("It costs £186 [2].", True, dict(right=True, cites=True, file=True, passage=True, wrong_too=False, unknown=0, found=True)),
    ("It costs £186 [2].", False, dict(right=True, cites=True, file=True, passage=False, found=False)),
    ("It costs £186 [1] [7].", True, dict(right=True, cites=True, file=False, passage=False, wrong_too=True, unknown=1)),
    ("It costs £1,186.", True, dict(right=False, cites=False)),
    ("[186]", True, dict(right=False, cites=False, unknown=1)),
])
def test_an_answer_is_marked(text, found, marks):
    question = next(each for each in knowledge_held_out.questions() if each.says == ("186",))
    passages = [(question.file, "Water", dict(knowledge_held_out.documents())[question.file])]
    verdict = knowledge_answers.asked(Answering(text, question, found), "m", "vs_1", passages, question, "search")
    assert {key: verdict[key] for key in marks} == marks


@pytest.mark.slow
def test_nothing_is_lost_or_left_at_a_small_size(capsys):
    """With kills in mid-ingest, a full disk, and deletions: the script ends with status 1 if any of its checks fails."""
    knowledge_scale.main(["--small"])
    shown = capsys.readouterr().out
    assert "none that was reported lost" in shown and "until no word of that owner" in shown
