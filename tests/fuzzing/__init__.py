"""What `make fuzz` sends to the whole stack: broken pictures, and requests made from the OpenAPI document."""
