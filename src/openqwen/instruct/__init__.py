"""Instructions → demonstrations D and preferences P (Qwen2 report, section 4.1)."""
