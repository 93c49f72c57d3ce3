//! SCTP (RFC 9260): what its packets say of their association, and their checksum after a change of ports.
//!
//! The checksum is CRC32c over the SCTP packet alone: addresses are none of it. It is linear: what a change of the first four bytes
//! changes is the change itself, taken past all bytes that follow, whatever these are.

use crate::packet::{ACK, FIN, RST, SYN};

/// Where the verification tag stands.
pub const TAG: usize = 4;
/// Where the checksum stands.
pub const CHECKSUM: usize = 8;
/// Where the first chunk's type stands.
pub const FIRST_CHUNK: usize = 12;
/// Where the tag stands that answers to an INIT are to have.
pub const INITIATE_TAG: usize = 16;

/// Chunk type INIT.
pub const INIT: u8 = 1;
/// Chunk type INIT ACK.
pub const INIT_ACK: u8 = 2;
/// Chunk type ABORT.
pub const ABORT: u8 = 6;
/// Chunk type SHUTDOWN COMPLETE.
pub const SHUTDOWN_COMPLETE: u8 = 14;

/// What a packet's first chunk says of its association, in TCP's flags: that it is asked for, granted, refused or over. The first one is
/// enough: three of these come alone, and an ABORT with others before it is rare.
#[inline(always)]
#[must_use]
pub const fn flags(first_chunk: u8) -> u8 {
    match first_chunk {
        INIT => SYN,
        INIT_ACK => SYN | ACK,
        ABORT => RST,
        SHUTDOWN_COMPLETE => FIN,
        _ => 0,
    }
}

/// The Castagnoli polynomial, the highest power in the lowest bit.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// Bits of the largest packet's length.
const LENGTHS: usize = 16;
/// What four bits of a CRC become, by their place in it and their value.
type Step = [[u32; 16]; 8];

/// What a CRC becomes by 1, 2, 4 … 32768 bytes of zeros.
static STEPS: [Step; LENGTHS] = steps();

const fn steps() -> [Step; LENGTHS] {
    let mut all = [[[0; 16]; 8]; LENGTHS];
    let mut length = 0;
    while length < LENGTHS {
        let mut place = 0;
        while place < 8 {
            let mut value = 0_u32;
            while value < 16 {
                let crc = value << (place * 4);
                all[length][place][value as usize] = match length {
                    0 => by_a_byte(crc),
                    _ => step(&all[length - 1], step(&all[length - 1], crc)),
                };
                value += 1;
            }
            place += 1;
        }
        length += 1;
    }
    all
}

const fn by_a_byte(mut crc: u32) -> u32 {
    let mut bit = 0;
    while bit < 8 {
        crc = (crc >> 1) ^ if crc & 1 == 0 { 0 } else { POLYNOMIAL };
        bit += 1;
    }
    crc
}

#[inline(always)]
const fn step(by: &Step, crc: u32) -> u32 {
    let mut out = 0;
    let mut place = 0;
    while place < 8 {
        out ^= by[place][(crc >> (place * 4)) as usize & 15];
        place += 1;
    }
    out
}

/// What a checksum changes by if a packet's first four bytes change by `change` (in exclusive or). Both are as they stand in memory, the
/// first byte lowest; `bytes` is the length of all the packet.
#[inline(always)]
#[must_use]
pub fn change_of_checksum(change: u32, bytes: u16) -> u32 {
    let mut crc = change;
    for (bit, by) in STEPS.iter().enumerate() {
        if bytes >> bit & 1 != 0 {
            crc = step(by, crc);
        }
    }
    crc
}

/// The checksum of a packet whose own is 0 yet; the first byte is the lowest, which is how it is sent.
#[inline(always)]
#[must_use]
pub fn checksum<const N: usize>(words: &[u32; N]) -> u32 {
    let mut crc = u32::MAX;
    for word in words {
        crc = step(&STEPS[2], crc ^ u32::from_le(*word));
    }
    !crc
}

#[cfg(test)]
mod tests;
