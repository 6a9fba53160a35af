// A text that is long enough to be quantized, and a question about its beginning.

export const EXAMPLE = `Read the log of the harbour of Lindvik, then answer.

Monday. The ferry Aurora came in at six with forty passengers and a crate of lemons for the hotel. The wind was \
from the north-west, and the crane on the east quay stood still until noon because its driver was at the \
dentist. A seal lay on the slipway and would not move.
Tuesday. Fog until ten. The pilot boat went out twice, once for a tanker and once for nothing, since the call \
had come from a boy with a toy radio. The harbour master, Ingrid Solheim, wrote to the school. The lamp at the \
end of the mole was replaced; the old one had burned for eleven years.
Wednesday. Two trawlers landed cod, nine tonnes in all, and the price fell by a third before lunch. The ice \
house ran out of ice, and boxes were carried to the brewery, where it is cold enough. The brewer asked for a box \
of fish and got it.
Thursday. A yacht named Perpetua asked for a berth for one night and stayed for three, because her owner had \
lost his spectacles and could not read the chart. They were found in the mouth of the seal, or so the children \
say. The spectacles were whole.
Friday. The Aurora was late, for the first time this year, by four minutes. The captain apologised over the \
loudspeaker to everybody who was waiting, which were two people and a dog. In the evening there was music in the \
net loft, and the lamp on the mole flickered and then held.
Saturday. Quiet. The harbour master counted ropes and found one more than there should be.

Why was the crane still on Monday, and who wrote to the school?`;
