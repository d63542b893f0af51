"""The page of `lediflow app`: what it does is free of Gradio; `tabs` and `page` lay it out."""
