"""A chat template that the tests of several modules render."""

HUB_MISTRAL = (  # what public copies of llava-v1.6-mistral carry does the same: images first, of others the first part
    "{% for message in messages %}{% if message['role'] == 'system' %}<<SYS>>\n{{ message['content'][0]['text'] }}\n"
    "<</SYS>>\n\n{% elif message['role'] == 'user' %}[INST] "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %} [/INST]"
    "{% else %} {{ message['content'][0]['text'] }}{{ eos_token }} {% endif %}{% endfor %}"
)
