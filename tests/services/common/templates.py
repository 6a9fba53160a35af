"""A chat template with tools and reasoning, in the manner of many models."""

CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
You may call functions:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}{% if message.tool_call_id %} ({{ message.tool_call_id }}){% endif %}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if always_thinking %}<think>
{% elif enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
