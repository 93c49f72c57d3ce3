//! What the programs know of tunnels: both ends of each, at the place where a packet's address leads.

use std::collections::BTreeMap;
use std::fmt;

use aya::maps::{Array, Map, MapData};
use weft_ebpf_abi::{Address, Tunnel, names};
use zerocopy::{FromZeros as _, IntoBytes as _};

use crate::programs::{self, ProgramError, Programs};

const TUNNEL_BYTES: usize = size_of::<Tunnel>();

/// The map of tunnels, with what it holds.
pub struct Tunnels {
    map: Array<MapData, [u8; TUNNEL_BYTES]>,
    applied: BTreeMap<u32, Tunnel>,
}

impl fmt::Debug for Tunnels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnels").field("applied", &self.applied).finish_non_exhaustive()
    }
}

impl Tunnels {
    /// With what an earlier agent left in the map.
    ///
    /// # Errors
    /// If the object has no such map, or it can't be read.
    pub fn adopt(programs: &Programs) -> Result<Self, ProgramError> {
        let name = names::TUNNELS;
        let Some(Map::Array(data)) = programs.ebpf.map(name) else { return Err(programs::mismatch(name)) };
        programs::check_layout(data, name, size_of::<u32>(), TUNNEL_BYTES)?;
        let wrap = |source| ProgramError::Map { name, source };
        let data = MapData::from_fd(programs::duplicate(data, name)?).map_err(wrap)?;
        let map: Array<_, [u8; TUNNEL_BYTES]> = Array::try_from(Map::Array(data)).map_err(wrap)?;
        let mut applied = BTreeMap::new();
        for place in 0..map.len() {
            let tunnel: Tunnel = zerocopy::transmute!(map.get(&place, 0).map_err(wrap)?);
            if tunnel.peer != Address::ANY {
                applied.insert(place, tunnel);
            }
        }
        Ok(Self { map, applied })
    }

    /// Brings the map to these. Of several that have one place the last gets it.
    ///
    /// # Errors
    /// If the kernel refuses an entry; the rest is tried next time.
    pub fn set(&mut self, tunnels: &[Tunnel]) -> Result<(), ProgramError> {
        let wanted: BTreeMap<u32, Tunnel> =
            tunnels.iter().map(|tunnel| (Tunnel::place(&tunnel.peer), *tunnel)).collect();
        let gone: Vec<u32> =
            self.applied.keys().filter(|place| !wanted.contains_key(place)).copied().collect();
        for place in gone {
            self.put(place, &Tunnel::new_zeroed())?;
            self.applied.remove(&place);
        }
        for (place, tunnel) in wanted {
            if self.applied.get(&place) != Some(&tunnel) {
                self.put(place, &tunnel)?;
                self.applied.insert(place, tunnel);
            }
        }
        Ok(())
    }

    fn put(&mut self, place: u32, tunnel: &Tunnel) -> Result<(), ProgramError> {
        let mut bytes = [0; TUNNEL_BYTES];
        bytes.copy_from_slice(tunnel.as_bytes());
        let wrap = |source| ProgramError::Map { name: names::TUNNELS, source };
        self.map.set(place, bytes, 0).map_err(wrap)
    }
}
