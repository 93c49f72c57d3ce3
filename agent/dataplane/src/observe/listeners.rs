//! Whether a process listens on a port, as the kernel's socket tables say. Nothing is sent.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::ObserveError;
use super::wire::Protocol;
use crate::node::{cgroup2_mount, failed};

/// `TCP_LISTEN` of linux/tcp_states.h.
const LISTEN: &str = "0A";
/// `TCP_CLOSE`: an unconnected UDP socket.
const UNCONNECTED: &str = "07";
/// `SCTP_SS_LISTENING` of net/sctp/constants.h, in decimals.
const SCTP_LISTENING: &str = "10";

/// A question about a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Listener {
    /// The pod; `None` for the node itself.
    pub pod_uid: Option<String>,
    /// The address that is asked.
    pub address: IpAddr,
    /// The port.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
}

/// What the socket tables say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Listening {
    /// A socket takes it.
    Yes,
    /// Only a socket bound to another address (such as loopback) has the port.
    Elsewhere,
    /// No socket has the port.
    No,
    /// It can't be told: no process of the pod was found, or the protocol has no table.
    Unknown,
}

/// Looks into the network namespace of a pod, through any of its processes.
pub(crate) fn of_pod(node_cgroup: &Path, uid: &str, about: &Listener) -> Result<Listening, ObserveError> {
    match process_of(node_cgroup, uid)? {
        Some(process) => in_tables(&Path::new("/proc").join(process.to_string()).join("net"), about),
        None => Ok(Listening::Unknown),
    }
}

/// A process of a pod, if it has one: it tells the pod's namespaces.
pub(crate) fn process_of(node_cgroup: &Path, uid: &str) -> Result<Option<u32>, ObserveError> {
    let root = cgroup2_mount()?.join(node_cgroup);
    match pod_folder(&root, uid) {
        Some(folder) => first_process(&folder),
        None => Ok(None),
    }
}

/// Looks into the calling thread's network namespace.
pub(crate) fn of_namespace(about: &Listener) -> Result<Listening, ObserveError> {
    in_tables(Path::new("/proc/thread-self/net"), about)
}

/// The folder of a pod's cgroup: `pod<uid>`, below the class of its quality of service or not.
fn pod_folder(root: &Path, uid: &str) -> Option<PathBuf> {
    let name = format!("pod{uid}");
    let classes = ["", "burstable", "besteffort"].map(|class| root.join(class).join(&name));
    classes.into_iter().find(|path| path.is_dir())
}

fn first_process(folder: &Path) -> Result<Option<u32>, ObserveError> {
    let entries = fs::read_dir(folder).map_err(failed("list cgroup", folder))?;
    let mut groups: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    groups.push(folder.to_path_buf());
    for group in groups {
        let path = group.join("cgroup.procs");
        match fs::read_to_string(&path) {
            Ok(text) => {
                if let Some(process) = text.lines().find_map(|line| line.parse().ok()) {
                    return Ok(Some(process));
                }
            }
            Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&error.kind()) => {
            }
            Err(error) => return Err(failed("read", &path)(error).into()),
        }
    }
    Ok(None)
}

fn in_tables(folder: &Path, about: &Listener) -> Result<Listening, ObserveError> {
    let (tables, state) = match about.protocol {
        Protocol::Tcp => (["tcp", "tcp6"], LISTEN),
        Protocol::Udp => (["udp", "udp6"], UNCONNECTED),
        Protocol::Sctp => return in_sctp(&folder.join("sctp/eps"), about),
    };
    let mut best = Listening::No;
    for table in tables {
        let path = folder.join(table);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            // A kernel without IPv6 has no such table; a process that ended has none at all.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed("read", &path)(error).into()),
        };
        match in_table(&text, state, about) {
            Listening::Yes => return Ok(Listening::Yes),
            Listening::Elsewhere => best = Listening::Elsewhere,
            Listening::No | Listening::Unknown => {}
        }
    }
    Ok(best)
}

/// SCTP has a table of its own, unless the kernel lacks it or has not loaded it.
fn in_sctp(path: &Path, about: &Listener) -> Result<Listening, ObserveError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(in_endpoints(&text, about)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Listening::Unknown),
        Err(error) => Err(failed("read", path)(error).into()),
    }
}

/// Its lines: two pointers, style, state, hash, port, user, inode, and all addresses, in numbers as people write them.
fn in_endpoints(text: &str, about: &Listener) -> Listening {
    let mut best = Listening::No;
    for line in text.lines().skip(1) {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, _, _, state, _, port, _, _, addresses @ ..] = fields.as_slice() else { continue };
        if *state != SCTP_LISTENING || port.parse() != Ok(about.port) {
            continue;
        }
        let mut bound = addresses.iter().filter_map(|text| text.parse::<IpAddr>().ok());
        if bound.any(|address| takes(address, about.address)) {
            return Listening::Yes;
        }
        best = Listening::Elsewhere;
    }
    best
}

/// Whether a socket bound to an address takes what is for another.
fn takes(bound: IpAddr, address: IpAddr) -> bool {
    bound.is_unspecified() || bound.to_canonical() == address
}

fn in_table(text: &str, state: &str, about: &Listener) -> Listening {
    let mut best = Listening::No;
    for line in text.lines().skip(1) {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (Some(local), Some(_), Some(found)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let Some((address, port)) = local.split_once(':') else { continue };
        if found != state || u16::from_str_radix(port, 16) != Ok(about.port) {
            continue;
        }
        match parse_address(address) {
            Some(bound) if takes(bound, about.address) => return Listening::Yes,
            _ => best = Listening::Elsewhere,
        }
    }
    best
}

/// Addresses stand as words in the machine's order.
fn parse_address(text: &str) -> Option<IpAddr> {
    let word = |at: usize| -> Option<[u8; 4]> {
        Some(u32::from_str_radix(text.get(at..at + 8)?, 16).ok()?.to_ne_bytes())
    };
    match text.len() {
        8 => Some(IpAddr::from(Ipv4Addr::from(word(0)?))),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            let mut bytes = [0; 16];
            for (at, byte) in words.iter().flatten().enumerate() {
                bytes[at] = *byte;
            }
            Some(IpAddr::from(Ipv6Addr::from(bytes)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP: &str =
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0 100 0 0 10 0
   2: 0200000A:01BB 0300000A:D431 01 00000000:00000000 00:00000000 00000000     0        0 3 1 0 100 0 0 10 0
";
    const TCP6: &str = "  sl  local_address                         remote_address                        st
   0: 00000000000000000000000000000000:1F91 00000000000000000000000000000000:0000 0A 00000000:00000000
   1: 0000000000000000FFFF00000200000A:1F92 00000000000000000000000000000000:0000 0A 00000000:00000000
";

    fn look(table: &str, port: u16) -> Listening {
        let address = IpAddr::from([10, 0, 0, 2]);
        let about = Listener { pod_uid: None, address, port, protocol: Protocol::Tcp };
        in_table(table, LISTEN, &about)
    }

    const EPS: &str = " ENDPT     SOCK   STY SST HBKT LPORT   UID INODE LADDRS
 1935545 e5461942 2   10  12   7000      0 11295 0.0.0.0
88efd772  db3bf8d 2   10  13   7001      0 11296 127.0.0.1
 1fc8dad 5655c4cb 2   10  14   7002      0 11297 0000:0000:0000:0000:0000:0000:0000:0000
21023660 57cee3ac 0   10  16   7004      0 11299 192.0.2.1 10.0.0.2
21023660 57cee3ac 0   7   16   7005      0 11299 0.0.0.0
";

    #[test]
    fn an_endpoint_of_sctp_takes_all_its_addresses() {
        let rows = [
            (7000, Listening::Yes),
            (7001, Listening::Elsewhere),
            (7002, Listening::Yes),
            (7004, Listening::Yes),
            (7005, Listening::No),
            (80, Listening::No),
        ];
        for (port, wanted) in rows {
            let address = IpAddr::from([10, 0, 0, 2]);
            let about = Listener { pod_uid: None, address, port, protocol: Protocol::Sctp };
            assert_eq!(in_endpoints(EPS, &about), wanted, "{port}");
        }
    }

    #[test]
    fn a_listener_takes_its_address_or_any() {
        assert_eq!(look(TCP, 80), Listening::Yes);
        assert_eq!(look(TCP, 8080), Listening::Elsewhere, "it listens on loopback");
        assert_eq!(look(TCP, 443), Listening::No, "a connection is no listener");
        assert_eq!(look(TCP6, 8081), Listening::Yes, "any address, of both families");
        assert_eq!(look(TCP6, 8082), Listening::Yes, "an IPv4 address mapped into IPv6");
        assert_eq!(look(TCP6, 80), Listening::No);
    }
}
