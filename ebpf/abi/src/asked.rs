//! What a packet to another node's pod says behind its end: what its client had asked for.

/// In words that stand in memory as on the wire: [`ASKED_VERSION`] and a checksum, the address that the client sends to, the port that it
/// sends to and the one that it sends from.
///
/// It follows an IP packet in the overlay, past the length that its header says. All of it sums up to zero (RFC 1071), wherever it begins: a
/// checksum that a device takes to the frame's end is the packet's own.
pub type Asked = [u32; 6];

/// First bytes of an [`Asked`]; another layout has others.
pub const ASKED_VERSION: [u8; 2] = [0xda, 1];
/// Bytes of an [`Asked`].
pub const ASKED_BYTES: u32 = 24;
const _: () = assert!(size_of::<Asked>() == 24);
/// Bit of the first byte of the hardware address that a frame in the overlay comes from: an [`Asked`] follows the packet. Nodes write
/// that address themselves, so no pod can set it.
pub const MAC_ASKED: u8 = 4;
