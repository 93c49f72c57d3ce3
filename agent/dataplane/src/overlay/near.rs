//! What the programs know of pods that are reached past the tunnel.

use std::collections::BTreeMap;
use std::fmt;

use aya::maps::lpm_trie::Key;
use aya::maps::{LpmTrie, Map, MapData};
use ipnetwork::IpNetwork;
use weft_ebpf_abi::{Address, names};

use crate::programs::{self, ProgramError, Programs};

const ADDRESS_BYTES: usize = size_of::<Address>();
/// Of a range in IPv6's form, before that of an IPv4 one begins.
const MAPPED_BITS: u32 = 96;

/// Length and address of a range, in IPv6's form.
type RangeBits = (u32, [u8; ADDRESS_BYTES]);

/// The programs' map of ranges, with what it holds.
pub struct NearRanges {
    map: LpmTrie<MapData, [u8; ADDRESS_BYTES], u32>,
    applied: BTreeMap<RangeBits, u32>,
}

impl fmt::Debug for NearRanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NearRanges").field("ranges", &self.applied.len()).finish()
    }
}

impl NearRanges {
    /// With what an earlier agent left in the map.
    ///
    /// # Errors
    /// If the object has no such map, or it can't be read.
    pub fn adopt(programs: &Programs) -> Result<Self, ProgramError> {
        let name = names::NEAR;
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
        Ok(Self { map, applied })
    }

    /// Brings the map up to these ranges, each with the device of its link.
    ///
    /// # Errors
    /// If the kernel refuses an entry; the rest is tried next time.
    pub fn set(&mut self, ranges: &BTreeMap<IpNetwork, u32>) -> Result<(), ProgramError> {
        let wrap = |source| ProgramError::Map { name: names::NEAR, source };
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
