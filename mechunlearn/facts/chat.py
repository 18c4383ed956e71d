"""Facts as a user asks a chat model: through the tokenizer's own template."""

from collections.abc import Sequence
from dataclasses import replace

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mechunlearn.errors import MechunlearnError
from mechunlearn.facts.formats import Fact, Query

CHAT = "chat"


def with_chat(facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase) -> tuple[Fact, ...]:
    r"""Return the facts with a further format, `chat`: the question in the tokenizer's chat template.

    Chat models answer in sentences ("The capital of Norway is Oslo."), also where a single word is asked for. So the
    assistant's turn is begun for them, and the answer is what comes next. It begins with what the format `question`
    shows behind "Answer:", else with the statement. A fact without a question is asked to "Complete the sentence".

    Args:
        facts: The facts.
        tokenizer: Its chat template is used. A beginning of text that it writes itself is not written twice.

    Raises:
        MechunlearnError: If there is no chat template, or it refuses a user's turn followed by an assistant's.

    >>> from transformers import PreTrainedTokenizerFast
    >>> from tokenizers import Tokenizer, models
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")))
    >>> tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    >>> query = Query("The capital of Norway is", "Oslo", subject="Norway")
    >>> asked = Query("Question: What is the capital of Norway? Answer:", "Oslo", subject="Norway")
    >>> fact, = with_chat([Fact("Norway", "capital", {"statement": query, "question": asked})], tokenizer)
    >>> print(fact.queries["chat"].prompt)
    [user] What is the capital of Norway?
    [assistant] The capital of Norway is
    """
    if not tokenizer.chat_template:
        raise MechunlearnError(
            "This model's tokenizer has no chat template, so facts cannot be asked in the format 'chat'. "
            "Expected an instruct model; ask others in the format 'question'."
        )
    return tuple(replace(fact, queries={**fact.queries, CHAT: _chat_query(fact, tokenizer)}) for fact in facts)


def _chat_query(fact: Fact, tokenizer: PreTrainedTokenizerBase) -> Query:
    """The question as the user's turn, and the beginning of the assistant's."""
    statement = fact.queries["statement"]
    asked = fact.queries.get("question", statement)
    user, is_question, reply = asked.prompt.removeprefix("Question: ").partition(" Answer:")
    if not is_question and asked is statement:
        user = f"Complete the sentence: {statement.prompt}"
    if not reply.strip():
        reply = "" if " Answer:" in statement.prompt else statement.prompt
    turns = [{"role": "user", "content": user}]
    try:
        if reply:
            turns.append({"role": "assistant", "content": reply.strip()})
            text = tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)
        else:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:
        raise MechunlearnError(
            f"The tokenizer's chat template refuses a user's turn followed by an assistant's: {error}"
        ) from None
    begin = tokenizer.bos_token
    if begin and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = str(text).removeprefix(begin)
    return replace(asked, prompt=str(text))
