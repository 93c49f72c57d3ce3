//! What the programs know of ranges of addresses: a number for each.

use std::collections::BTreeMap;
use std::fmt;

use aya::maps::lpm_trie::Key;
use aya::maps::{LpmTrie, Map, MapData};
use ipnetwork::IpNetwork;
use weft_ebpf_abi::Address;

use crate::programs::{self, ProgramError, Programs};

const ADDRESS_BYTES: usize = size_of::<Address>();
/// Of a range in IPv6's form, before that of an IPv4 one begins.
const MAPPED_BITS: u32 = 96;

/// Length and address of a range, in IPv6's form.
type RangeBits = (u32, [u8; ADDRESS_BYTES]);

/// A map of ranges, with what it holds.
pub struct Ranges {
    name: &'static str,
    map: LpmTrie<MapData, [u8; ADDRESS_BYTES], u32>,
    applied: BTreeMap<RangeBits, u32>,
}

impl fmt::Debug for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ranges").field("map", &self.name).field("ranges", &self.applied.len()).finish()
    }
}

impl Ranges {
    /// The map of this name, with what an earlier agent left in it.
    ///
    /// # Errors
    /// If the object has no such map, or it can't be read.
    pub fn adopt(programs: &Programs, name: &'static str) -> Result<Self, ProgramError> {
        let Some(Map::LpmTrie(data)) = programs.ebpf.map(name) else { return Err(programs::mismatch(name)) };
        programs::check_layout(data, name, size_of::<u32>() + ADDRESS_BYTES, size_of::<u32>())?;
        let wrap = |source| ProgramError::Map { name, source };
        let data = MapData::from_fd(programs::duplicate(data, name)?).map_err(wrap)?;
        let map = LpmTrie::try_from(Map::LpmTrie(data)).map_err(wrap)?;
        let mut applied = BTreeMap::new();
        for entry in map.iter() {
            let (key, index) = entry.map_err(wrap)?;
            applied.insert((key.prefix_len(), key.data()), index);
        }
        Ok(Self { name, map, applied })
    }

    /// Brings the map up to these ranges, each with its number.
    ///
    /// # Errors
    /// If the kernel refuses an entry; the rest is tried next time.
    pub fn set(&mut self, ranges: &BTreeMap<IpNetwork, u32>) -> Result<(), ProgramError> {
        let name = self.name;
        let wrap = |source| ProgramError::Map { name, source };
        let wanted: BTreeMap<_, _> = ranges.iter().map(|(range, index)| (bits(*range), *index)).collect();
        let gone: Vec<_> = self.applied.keys().filter(|range| !wanted.contains_key(range)).copied().collect();
        for range in gone {
            self.map.remove(&Key::new(range.0, range.1)).map_err(wrap)?;
            self.applied.remove(&range);
        }
        for (range, index) in wanted {
            if self.applied.get(&range) != Some(&index) {
                self.map.insert(&Key::new(range.0, range.1), index, 0).map_err(wrap)?;
                self.applied.insert(range, index);
            }
        }
        Ok(())
    }
}

fn bits(range: IpNetwork) -> RangeBits {
    let longer = if range.is_ipv4() { MAPPED_BITS } else { 0 };
    (u32::from(range.prefix()) + longer, Address::from(range.network()).0)
}
