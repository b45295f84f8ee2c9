"""The Hugging Face hub: fetching SAEs from it, and publishing them there."""
