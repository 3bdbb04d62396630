"""The shape vocabulary of signatures; the letters are those of docs/design.md."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Queries = Float[Tensor, "B H L D"]
Keys = Float[Tensor, "B H S D"]
Values = Float[Tensor, "B H S V"]
Outputs = Float[Tensor, "B H L V"]
LogSums = Float[Tensor, "B H L"]
Inputs = Float[Tensor, "B L E"]
Context = Float[Tensor, "B S E"]
Keep = Bool[Tensor, "B S"]
Marks = Bool[Tensor, "B L"]
Tokens = Int[Tensor, "B L"]
