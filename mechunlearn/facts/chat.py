"""Facts as a user asks a chat model: through the tokenizer's own template."""

from collections.abc import Mapping, Sequence
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


def rendered(query: Query, tokenizer: PreTrainedTokenizerBase) -> Query:
    r"""Return a query whose conversation the chat template has written out, with what it puts before an answer.

    Args:
        query: The query. One without `turns` is returned as it is.
        tokenizer: Its chat template is used.

    Raises:
        MechunlearnError: If there is no chat template, or it refuses the conversation.

    >>> from transformers import PreTrainedTokenizerFast
    >>> from tokenizers import Tokenizer, models
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")))
    >>> tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}; {% endfor %}[assistant]"
    >>> rendered(Query("", "Oslo", turns=(("user", "Norway's capital?"),)), tokenizer).prompt
    "[user] Norway's capital?; [assistant]"
    """
    if not query.turns:
        return query
    if not tokenizer.chat_template:
        raise MechunlearnError(
            "These facts are conversations, and this model's tokenizer has no chat template to write them out. Expected an "
            "instruct model, or facts with the columns prompt and answer."
        )
    turns = [{"role": role, "content": text} for role, text in query.turns]
    prompt = _written(tokenizer, turns, add_generation_prompt=True)
    whole = _written(tokenizer, [*turns, {"role": "assistant", "content": query.answer}])
    between, found, _ = whole[len(prompt) :].partition(query.answer)
    stands = whole.startswith(prompt) and bool(found) and not between.strip()
    separator = between if query.separator is None and stands else query.separator
    return replace(query, prompt=prompt, separator=separator, turns=())


def _chat_query(fact: Fact, tokenizer: PreTrainedTokenizerBase) -> Query:
    """The question as the user's turn, and the beginning of the assistant's."""
    statement = fact.queries["statement"]
    if statement.turns:
        return rendered(statement, tokenizer)
    asked = fact.queries.get("question", statement)
    user, is_question, reply = asked.prompt.removeprefix("Question: ").partition(" Answer:")
    if not is_question and asked is statement:
        user = f"Complete the sentence: {statement.prompt}"
    if not reply.strip():
        reply = "" if " Answer:" in statement.prompt else statement.prompt
    turns = [{"role": "user", "content": user}]
    if reply:
        turns.append({"role": "assistant", "content": reply.strip()})
        text = _written(tokenizer, turns, continue_final_message=True)
    else:
        text = _written(tokenizer, turns, add_generation_prompt=True)
    return replace(asked, prompt=text)


def _written(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]], **how: bool) -> str:
    """The turns as the template writes them, without a beginning of text that the tokenizer puts there itself."""
    try:
        text = str(tokenizer.apply_chat_template(list(turns), tokenize=False, **how))  # type: ignore[arg-type]
    except (TemplateError, ValueError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise MechunlearnError(f"The tokenizer's chat template refuses turns of {roles}: {error}") from None
    begin = tokenizer.bos_token
    if begin and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(begin)
    return text
