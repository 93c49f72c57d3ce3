//! The kernel's switches of a network namespace. `/proc/sys/net` shows those of the thread that opens a file.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use crate::Error;

const IPV4: &str = "/proc/sys/net/ipv4";
const IPV6: &str = "/proc/sys/net/ipv6/conf";
const IPV6_NEIGHBOURS: &str = "/proc/sys/net/ipv6/neigh";

/// More than any switch has.
const MAX_VALUE_BYTES: usize = 16;

/// `accept_ra`: take routers' announcements although the machine forwards.
const ACCEPT_ALTHOUGH_FORWARDING: &[u8] = b"2";

/// Turns on the forwarding of IPv4.
///
/// # Errors
/// If the switch can't be read or written.
pub fn forward_ipv4() -> Result<(), Error> {
    set(&Path::new(IPV4).join("ip_forward"), b"1")
}

/// Turns on the forwarding of IPv6.
///
/// A machine that forwards takes no more announcements of routers and forgets the routes that it has of them. Devices that take
/// them now go on doing so: they may be where the machine's own default route comes from.
///
/// # Errors
/// If a switch can't be read or written.
pub fn forward_ipv6() -> Result<(), Error> {
    let conf = Path::new(IPV6);
    let forwarding = conf.join("all/forwarding");
    if read(&forwarding)?.trim_ascii() == b"1" {
        return Ok(());
    }
    for device in fs::read_dir(conf).map_err(failed("read", conf))? {
        let device = device.map_err(failed("read", conf))?;
        if ["all", "default", "lo"].iter().any(|name| device.file_name() == *name) {
            continue;
        }
        let switch = device.path().join("accept_ra");
        // A device that is gone by now has no routes to lose.
        if read(&switch).is_ok_and(|value| value.trim_ascii() == b"1") {
            ok_if_gone(set(&switch, ACCEPT_ALTHOUGH_FORWARDING))?;
        }
    }
    set(&forwarding, b"1")
}

/// Makes a device take no announcements of routers: who has a port of a bridge could give everybody else a route.
/// A kernel without IPv6 takes none anyway.
///
/// # Errors
/// If the switch can't be written.
pub fn refuse_routers(device: &str) -> Result<(), Error> {
    ok_if_gone(set(&Path::new(IPV6).join(device).join("accept_ra"), b"0"))
}

/// The same for a device that is new, which takes them by default: not read before it is written.
///
/// # Errors
/// If the switch can't be written.
pub fn refuse_routers_anew(device: &str) -> Result<(), Error> {
    let path = Path::new(IPV6).join(device).join("accept_ra");
    ok_if_gone(fs::write(&path, b"0").map_err(failed("write", &path)))
}

/// Readies a device for IPv6 addresses: IPv6 is on, and no address waits for duplicate address detection, the kernel's own
/// included.
///
/// # Errors
/// If a switch can't be written, as without IPv6.
pub fn use_ipv6(device: &str) -> Result<(), Error> {
    let conf = Path::new(IPV6).join(device);
    set(&conf.join("disable_ipv6"), b"0")?;
    set(&conf.join("accept_dad"), b"0")
}

/// Lets this host send from loopback addresses out of a device; who answers must be kept from using them by other means.
///
/// # Errors
/// If the switch can't be written.
pub fn route_loopback(device: &str) -> Result<(), Error> {
    set(&Path::new(IPV4).join("conf").join(device).join("route_localnet"), b"1")
}

/// Lets a device take packets whose answers leave by another one, where the kernel would check that they don't (RFC 3704 §2.2); of
/// the two checks the loose one is left. There is none of IPv6.
///
/// # Errors
/// If the switch can't be read or written.
pub fn loosen_reverse_path(device: &str) -> Result<(), Error> {
    let conf = Path::new(IPV4).join("conf");
    let own = conf.join(device).join("rp_filter");
    // The greater of the two holds.
    let strict = |path: &Path| read(path).map(|value| value.trim_ascii() == b"1");
    if strict(&own)? || strict(&conf.join("all/rp_filter"))? {
        set(&own, b"2")?;
    }
    Ok(())
}

/// Lets the kernel answer on a device for addresses that it is told to answer for, and at once: a router in their place would wait
/// for their owner to be faster.
///
/// # Errors
/// If a switch can't be written, as without IPv6.
pub fn answer_for_proxies(device: &str) -> Result<(), Error> {
    set(&Path::new(IPV6).join(device).join("proxy_ndp"), b"1")?;
    set(&Path::new(IPV6_NEIGHBOURS).join(device).join("proxy_delay"), b"0")
}

/// Writes a value unless it is there already: reading takes no lock, writing may.
fn set(path: &Path, value: &[u8]) -> Result<(), Error> {
    if read(path)?.trim_ascii() == value {
        return Ok(());
    }
    fs::write(path, value).map_err(failed("write", path))
}

/// A switch is a small number, and comes whole.
fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let mut value = vec![0; MAX_VALUE_BYTES];
    let read = fs::File::open(path).and_then(|mut file| file.read(&mut value));
    value.truncate(read.map_err(failed("read", path))?);
    Ok(value)
}

fn ok_if_gone(outcome: Result<(), Error>) -> Result<(), Error> {
    match outcome {
        Err(Error::Sysctl { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn failed(op: &'static str, path: &Path) -> impl Fn(io::Error) -> Error {
    let path: PathBuf = path.to_path_buf();
    move |source| Error::Sysctl { op, path: path.clone(), source }
}
