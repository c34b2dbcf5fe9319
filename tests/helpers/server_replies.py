"""What judge servers reply in place of an answer, in the forms of many of them."""

from helpers.judge_server import Special, choice

BAD = "Question 3?"  # what the servers here take exception to


def error(message: str, code=None, kind: str = "invalid_request_error", param=None) -> dict:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


REFUSALS = {
    "openai-context": Special(
        400,
        error("This model's maximum context length is 8192 tokens. Please reduce it.", "context_length_exceeded"),
    ),
    "openai-policy": Special(400, error("Invalid prompt: it was flagged under our usage policy.", "invalid_prompt")),
    "azure": Special(
        400,
        {
            "error": {
                "message": "The response was filtered due to the prompt triggering the content management policy.",
                "code": "content_filter",
                "status": 400,
                "innererror": {"code": "ResponsibleAIPolicyViolation"},
            }
        },
    ),
    "vllm-old": Special(
        400,
        {
            "object": "error",
            "message": "This model's maximum context length is 2048 tokens. However, you requested 3000 tokens.",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        },
    ),
    "vllm": Special(
        400,
        error(
            "'max_tokens' or 'max_completion_tokens' is too large: 1024. This model's maximum context length is 2048.",
            400,
            "BadRequestError",
        ),
    ),
    "sglang": Special(
        400, {"object": "error", "message": "The input (5000 tokens) is longer than the model's context."}
    ),
    "llama.cpp": Special(
        400,
        error("the request exceeds the available context size, try increasing it", 400, "exceed_context_size_error"),
    ),
    "llama.cpp-500": Special(500, error("input is too large to process. increase the batch size", 500, "server_error")),
    "tgi": Special(422, {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096"}),
    "anthropic": Special(
        400,
        {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "prompt is too long: 210000 tokens > 200000 maximum"},
        },
    ),
    "anthropic-413": Special(413, {"type": "error", "error": {"type": "request_too_large", "message": "Too large"}}),
    "openrouter": Special(
        403,
        {
            "error": {
                "code": 403,
                "message": "m requires moderation. Your input was flagged",
                "metadata": {"reasons": ["violence"]},
            }
        },
    ),
    "openrouter-200": Special(200, {"error": {"code": 400, "message": "maximum context length is 8192 tokens"}}),
    "gemini": Special(400, [{"error": {"code": 400, "message": "The input token count (9) exceeds the maximum (8)."}}]),
    "groq-413": Special(
        413, error("Request too large for model m on tokens per minute", "rate_limit_exceeded", "tokens")
    ),
    "firewall": Special(403, "<html><head><title>403 Forbidden</title></head><body>Rule 949110</body></html>"),
    "unknown-400": Special(400, error("Something about this one.")),
    "no-body": Special(400, ""),
    "filtered": choice("Half an answ", "content_filter"),
    "filtered-null": choice(None, "content_filter", usage=False),
    "safety": choice("", "SAFETY"),
    "refusal": choice(None, "stop", refusal="I cannot compare these."),
    "refusal-finish": choice("", "refusal"),
    "null": choice(None),
    "thought-only": choice(None, "stop", reasoning_content="Preferred: A"),
    "thought-cut": choice("", "length", reasoning_content="Preferred: A"),
    "cut": choice("One is shorter.\nPreferred: A", "length"),
    "thought-unclosed": choice("<think>One is shorter.\nPreferred: A"),
    "parts": choice([{"type": "thinking", "thinking": [{"type": "text", "text": "x"}]}, {"type": "text", "text": "?"}]),
    "no-choice": Special(200, {"id": "1", "object": "chat.completion", "choices": [], "usage": None}),
}
SAID = {  # what `raw` and `reason` say
    "openai-context": ("too long for the judge", "context_length_exceeded"),
    "openai-policy": ("content filter", "usage policy"),
    "azure": ("content filter", "content_filter"),
    "vllm-old": ("too long for the judge", "2048 tokens"),
    "vllm": ("too long for the judge", "maximum context length"),
    "sglang": ("too long for the judge", "5000 tokens"),
    "llama.cpp": ("too long for the judge", "exceed_context_size_error"),
    "llama.cpp-500": ("too long for the judge", "status 500"),
    "tgi": ("too long for the judge", "max_new_tokens"),
    "anthropic": ("too long for the judge", "prompt is too long"),
    "anthropic-413": ("too long for the judge", "request_too_large"),
    "openrouter": ("content filter", "violence"),
    "openrouter-200": ("too long for the judge", "8192"),
    "gemini": ("too long for the judge", "token count"),
    "groq-413": ("too long for the judge", "Request too large"),
    "firewall": ("refused by the server", "403 Forbidden"),
    "unknown-400": ("refused by the server", "Something about this one."),
    "no-body": ("refused by the server", "400"),
    "filtered": ("content filter", "content_filter] Half an answ"),
    "filtered-null": ("content filter", "finish_reason content_filter"),
    "safety": ("content filter", "SAFETY"),
    "refusal": ("declined by the judge", "I cannot compare these."),
    "refusal-finish": ("content filter", "finish_reason refusal"),
    "null": ("no answer", "no answer"),
    "thought-only": ("thought without an answer", "thought"),
    "thought-cut": ("cut at the token limit", "cut"),
    "cut": ("cut at the token limit", "One is shorter."),
    "thought-unclosed": ("unfinished thought", "<think>"),
    "parts": ("no line with a verdict", "?"),
    "no-choice": ("refused by the server", "no choice"),
}
TEMPERATURE = {
    "openai": error(
        "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
        "unsupported_value",
        param="temperature",
    ),
    "no-param": error("temperature is not supported by m; supported: model, messages, max_tokens"),
    "anthropic": {"type": "error", "error": {"message": "`temperature` is deprecated for this model."}},
    "strict": {"error": "Input validation error: `temperature` must be strictly positive"},
    "fastapi": {
        "detail": [{"type": "extra_forbidden", "loc": ["body", "temperature"], "msg": "Extra inputs", "input": 0}]
    },
}
LIMIT = {
    "openai": error(
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
        "unsupported_parameter",
        param="max_tokens",
    ),
    "no-param": error("Unrecognized request argument supplied: max_tokens"),
    "other-named": error("max_completion_tokens is required"),
    "fastapi": {
        "detail": [{"type": "extra_forbidden", "loc": ["body", "max_tokens"], "msg": "Extra inputs", "input": 9}]
    },
}
