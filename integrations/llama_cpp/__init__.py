"""What llama.cpp quantizes with: importance matrices and the types of tensors."""
