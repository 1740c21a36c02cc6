"""peft's LORA format, written and read without peft."""
