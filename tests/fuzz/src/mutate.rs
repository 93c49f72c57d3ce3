//! Inputs made from seeds, the same ones every time.

/// The longest input made.
const MAX_BYTES: usize = 4096;
/// Mutations of one input.
const MAX_MUTATIONS: usize = 6;

/// What parsers of numbers and texts stumble on.
const WORDS: &[&[u8]] = &[
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x80\0\0\0",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"-1",
    b"65536",
    b"4294967296",
    b"9223372036854775807",
    b"-9223372036854775808",
    b"1e309",
    b"NaN",
    b"\"",
    b"null",
    b"[]",
    b"{}",
    b"{",
    b"]",
    b"../",
    b"%00",
    b"%",
    b"*",
    b"\xc3\xa9",
    b"\xe2\x80\x8b",
    b"\n",
    b" ",
    b",",
    b"::ffff:10.0.0.1",
];

/// Endless inputs made from seeds.
#[derive(Debug)]
pub struct Mutations {
    seeds: Vec<Vec<u8>>,
    state: u64,
}

impl Mutations {
    /// Of these seeds; without any, of nothing.
    #[must_use]
    pub fn new(mut seeds: Vec<Vec<u8>>) -> Self {
        seeds.push(Vec::new());
        Self { seeds, state: 0x9E37_79B9_7F4A_7C15 }
    }

    /// xorshift64.
    fn random(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }

    fn below(&mut self, count: usize) -> usize {
        let count = u64::try_from(count.max(1)).unwrap_or(1);
        usize::try_from(self.random() % count).unwrap_or(0)
    }

    fn byte(&mut self) -> u8 {
        self.random().to_be_bytes()[3]
    }

    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        let at = self.below(bytes.len() + 1);
        let end = at + self.below(bytes.len() - at + 1);
        match self.below(9) {
            0 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << (end % 8)),
            1 => {
                let new = self.byte();
                bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = new);
            }
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            5 => {
                let word = WORDS[self.below(WORDS.len())];
                bytes.splice(at..at, word.iter().copied());
            }
            6 => {
                let word = WORDS[self.below(WORDS.len())];
                bytes.splice(at..end.min(at + word.len()), word.iter().copied());
            }
            7 => {
                let other = self.below(self.seeds.len());
                let from = self.below(self.seeds[other].len() + 1);
                let tail = self.seeds[other][from..].to_vec();
                bytes.splice(at.., tail);
            }
            _ => {
                let noise: Vec<u8> = (0..self.below(64)).map(|_| self.byte()).collect();
                bytes.splice(at..at, noise);
            }
        }
        bytes.truncate(MAX_BYTES);
    }
}

impl Iterator for Mutations {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let seed = self.below(self.seeds.len());
        let mut bytes = self.seeds[seed].clone();
        for _ in 0..=self.below(MAX_MUTATIONS) {
            self.mutate(&mut bytes);
        }
        Some(bytes)
    }
}
