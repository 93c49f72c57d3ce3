//! What a node believes of others, kept as folders beside the pinned maps: a folder named by an address is a node that does not
//! answer. They live as long as the maps, so the next agent goes on with it, and any tool can look.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use crate::node::{NodeError, failed};

/// Below the folder of the pins. A bpffs takes folders, but no dots in their names.
const FOLDER: &str = "silent";

/// The folder of a node's pins, as far as this is concerned.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    folder: PathBuf,
}

impl Memory {
    pub(crate) fn of(pins: &Path) -> Self {
        Self { folder: pins.join(FOLDER) }
    }

    /// The addresses of the nodes that don't answer.
    pub(crate) fn load(&self) -> Result<BTreeSet<IpAddr>, NodeError> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            Err(error) => return Err(failed("list", &self.folder)(error)),
        };
        Ok(entries.flatten().filter_map(|entry| address(entry.file_name().to_str()?)).collect())
    }

    /// Makes it what is believed now.
    pub(crate) fn store(&self, silent: &BTreeSet<IpAddr>) -> Result<(), NodeError> {
        let before = self.load()?;
        for gone in before.difference(silent) {
            remove(&self.folder.join(name(*gone)))?;
        }
        for new in silent.difference(&before) {
            let folder = self.folder.join(name(*new));
            fs::create_dir_all(&folder).map_err(failed("make folder", &folder))?;
        }
        Ok(())
    }

    /// Takes it away; what is gone already is no error.
    pub(crate) fn remove(&self) -> Result<(), NodeError> {
        self.store(&BTreeSet::new())?;
        remove(&self.folder)
    }
}

fn remove(folder: &Path) -> Result<(), NodeError> {
    match fs::remove_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove folder", folder)(error)),
        _ => Ok(()),
    }
}

/// 8 hexadecimal digits of IPv4, 32 of IPv6.
fn name(address: IpAddr) -> String {
    match address {
        IpAddr::V4(ip) => format!("{:08x}", u32::from(ip)),
        IpAddr::V6(ip) => format!("{:032x}", u128::from(ip)),
    }
}

fn address(name: &str) -> Option<IpAddr> {
    match name.len() {
        8 => Some(Ipv4Addr::from(u32::from_str_radix(name, 16).ok()?).into()),
        32 => Some(Ipv6Addr::from(u128::from_str_radix(name, 16).ok()?).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_addresses() {
        for text in ["10.44.0.2", "0.0.0.1", "fd44::2", "::1"] {
            let ip: IpAddr = text.parse().unwrap();
            assert_eq!(address(&name(ip)), Some(ip));
        }
        assert_eq!(address("maps"), None);
        assert_eq!(address("zzzzzzzz"), None);
    }
}
