//! The bpf(2) calls that aya has not: batches, links that can be updated in place, pins of plain descriptors.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const MAP_LOOKUP_ELEM: libc::c_long = 1;
const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const OBJ_INFO: libc::c_long = 15;
const MAP_LOOKUP_BATCH: libc::c_long = 24;
const MAP_UPDATE_BATCH: libc::c_long = 26;
const MAP_DELETE_BATCH: libc::c_long = 27;
/// `BPF_LINK_TYPE_TCX`.
const LINK_TCX: u32 = 11;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;
const LINK_DETACH: libc::c_long = 34;

/// `union bpf_attr`, member for one element.
#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `union bpf_attr`, member `batch`.
#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// `union bpf_attr`, member `link_create`; the rest of it is zero for the types used here.
#[repr(C)]
#[derive(Default)]
struct LinkCreateAttr {
    prog_fd: u32,
    /// Cgroup's descriptor or the device's index.
    target: u32,
    attach_type: u32,
    flags: u32,
    rest: [u64; 4],
}

/// `union bpf_attr`, member `link_update`.
#[repr(C)]
#[derive(Default)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// `union bpf_attr` for the pin commands.
#[repr(C)]
#[derive(Default)]
struct ObjAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<i32> {
    // SAFETY: `attr` is the union's member for the command, every pointer in it is valid for the call, and the kernel takes
    // the bytes behind a shorter struct as zero.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(i32::try_from(result).unwrap_or(0)) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    u32::try_from(fd.as_raw_fd()).unwrap_or(u32::MAX)
}

fn address(bytes: &[u8]) -> u64 {
    bytes.as_ptr() as u64
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just returned this descriptor, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Reads the value of a key into `value`; `false` if there is none. The slices must have the map's sizes.
pub(crate) fn lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let mut attr = ElementAttr {
        map_fd: number(map),
        key: address(key),
        value: value.as_mut_ptr() as u64,
        ..ElementAttr::default()
    };
    match bpf(MAP_LOOKUP_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Gives the kernel back what the allocator keeps for later. To be called when much less is needed than just now.
pub(crate) fn give_memory_back() {
    // SAFETY: it takes no pointer, and may be called at any time from any thread.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Nanoseconds of the clock that the programs read.
pub(crate) fn monotonic_ns() -> u64 {
    let clock = nix::time::ClockId::CLOCK_MONOTONIC;
    let now = clock.now().map_or(std::time::Duration::ZERO, std::time::Duration::from);
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Seconds of that clock.
pub(crate) fn monotonic_seconds() -> u32 {
    u32::try_from(monotonic_ns() / 1_000_000_000).unwrap_or(u32::MAX)
}

/// Sets `count` entries; `keys` and `values` hold them one behind the other. Returns how many were done, and why not all.
pub(crate) fn update_batch(
    map: BorrowedFd<'_>,
    keys: &[u8],
    values: &[u8],
    count: u32,
) -> (u32, io::Result<()>) {
    let mut attr = BatchAttr {
        keys: address(keys),
        values: address(values),
        count,
        map_fd: number(map),
        ..BatchAttr::default()
    };
    let result = bpf(MAP_UPDATE_BATCH, &mut attr).map(|_| ());
    (attr.count.min(count), result)
}

/// Removes `count` keys. Returns how many were done, and why not all.
pub(crate) fn delete_batch(map: BorrowedFd<'_>, keys: &[u8], count: u32) -> (u32, io::Result<()>) {
    let mut attr = BatchAttr { keys: address(keys), count, map_fd: number(map), ..BatchAttr::default() };
    let result = bpf(MAP_DELETE_BATCH, &mut attr).map(|_| ());
    (attr.count.min(count), result)
}

/// Reads all entries of a hash map or trie, as keys and values one behind the other.
pub(crate) fn read_all(
    map: BorrowedFd<'_>,
    key_bytes: usize,
    value_bytes: usize,
) -> io::Result<(Vec<u8>, Vec<u8>)> {
    // More than the longest chain of a bucket that is ever expected; doubled when the kernel says it is not.
    let mut chunk = 4_096_usize;
    let (mut all_keys, mut all_values) = (Vec::new(), Vec::new());
    // A hash map's position is the number of a bucket, a trie's the last key.
    let mut position: Option<Vec<u8>> = None;
    let mut next = vec![0_u8; key_bytes.max(size_of::<u32>())];
    loop {
        let mut keys = vec![0_u8; chunk * key_bytes];
        let mut values = vec![0_u8; chunk * value_bytes];
        let mut attr = BatchAttr {
            in_batch: position.as_ref().map_or(0, |p| address(p)),
            out_batch: next.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: u32::try_from(chunk).unwrap_or(u32::MAX),
            map_fd: number(map),
            ..BatchAttr::default()
        };
        let result = bpf(MAP_LOOKUP_BATCH, &mut attr);
        let end = match result {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                chunk *= 2;
                continue;
            }
            Err(error) => return Err(error),
        };
        let count = attr.count as usize;
        all_keys.extend_from_slice(&keys[..count * key_bytes]);
        all_values.extend_from_slice(&values[..count * value_bytes]);
        if end {
            return Ok((all_keys, all_values));
        }
        position = Some(next.clone());
    }
}

/// Attaches a program: `target` is a cgroup's descriptor or a device's index.
pub(crate) fn link_create(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut attr =
        LinkCreateAttr { prog_fd: number(program), target, attach_type, flags, ..LinkCreateAttr::default() };
    bpf(LINK_CREATE, &mut attr).map(owned)
}

/// Puts another program into a link, between two packets.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr =
        LinkUpdateAttr { link_fd: number(link), new_prog_fd: number(program), ..LinkUpdateAttr::default() };
    bpf(LINK_UPDATE, &mut attr).map(|_| ())
}

/// `union bpf_attr`, member `link_detach`.
#[repr(C)]
#[derive(Default)]
struct LinkDetachAttr {
    link_fd: u32,
}

/// Takes a link off its cgroup or device at once; dropping the last reference does so only some time later.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(LINK_DETACH, &mut LinkDetachAttr { link_fd: number(link) }).map(|_| ())
}

/// `union bpf_attr`, member `info`.
#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The head of `struct bpf_link_info`. The first word of its union is a cgroup's id, or for tcx the device's index in the
/// low half; both are zero once what the link was attached to is gone.
#[repr(C)]
#[derive(Default)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    pad: u32,
    target: u64,
    rest: [u64; 8],
}

/// What a link joins.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkInfo {
    /// Id of its program.
    pub(crate) program: u32,
    /// What it is attached to: a cgroup's id, or in the low half a device's index; 0 if that is gone.
    pub(crate) target: u64,
}

/// Looks at a link.
pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let mut info = RawLinkInfo::default();
    let mut attr = InfoAttr {
        bpf_fd: number(link),
        info_len: u32::try_from(size_of::<RawLinkInfo>()).unwrap_or(0),
        info: std::ptr::from_mut(&mut info) as u64,
    };
    bpf(OBJ_INFO, &mut attr)?;
    // SAFETY: the kernel wrote into it behind the compiler's back; every bit pattern is valid.
    let info = unsafe { std::ptr::read_volatile(&raw const info) };
    // A device's link has its attach type in the high half, which stays when the device goes.
    let target = if info.kind == LINK_TCX { info.target & 0xffff_ffff } else { info.target };
    Ok(LinkInfo { program: info.program, target })
}

/// Id of a program: the second word of `struct bpf_prog_info`.
pub(crate) fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    let mut head = [0_u32; 2];
    let mut attr = InfoAttr {
        bpf_fd: number(program),
        info_len: u32::try_from(size_of_val(&head)).unwrap_or(0),
        info: (&raw mut head) as u64,
    };
    bpf(OBJ_INFO, &mut attr)?;
    // SAFETY: the kernel wrote into it behind the compiler's back; every bit pattern is valid.
    let [_, id] = unsafe { std::ptr::read_volatile(&raw const head) };
    Ok(id)
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Pins a descriptor.
pub(crate) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = ObjAttr { pathname: path.as_ptr() as u64, bpf_fd: number(fd), file_flags: 0 };
    bpf(OBJ_PIN, &mut attr).map(|_| ())
}

/// Opens what is pinned.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = ObjAttr { pathname: path.as_ptr() as u64, ..ObjAttr::default() };
    bpf(OBJ_GET, &mut attr).map(owned)
}

/// The cookie of the calling thread's network namespace.
pub(crate) fn netns_cookie() -> io::Result<u64> {
    /// `SO_NETNS_COOKIE` of asm-generic/socket.h.
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
    let mut cookie = 0_u64;
    let mut length: libc::socklen_t = 8;
    // SAFETY: the socket is open, and the buffer has the length given.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

/// A packet socket for ARP on one device, non-blocking.
pub(crate) fn arp_socket(index: u32) -> io::Result<OwnedFd> {
    const ETH_P_ARP: u16 = 0x0806;
    let protocol = i32::from(ETH_P_ARP.to_be());
    // SAFETY: socket takes three integers and returns a new descriptor or -1.
    let fd = unsafe {
        libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, protocol)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let socket = owned(fd);
    // SAFETY: all zeros are a valid address.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).map_err(io::Error::other)?;
    address.sll_protocol = ETH_P_ARP.to_be();
    address.sll_ifindex = i32::try_from(index).map_err(io::Error::other)?;
    let size = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).map_err(io::Error::other)?;
    // SAFETY: the address is valid for the size given, and the socket is open.
    let bound = unsafe { libc::bind(fd, std::ptr::from_ref(&address).cast(), size) };
    if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

/// Has ICMP errors about what a socket has sent queued for it.
pub(crate) fn queue_errors(socket: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    use nix::sys::socket::{setsockopt, sockopt};
    let set = match v6 {
        false => setsockopt(&socket, sockopt::Ipv4RecvErr, &true),
        true => setsockopt(&socket, sockopt::Ipv6RecvErr, &true),
    };
    set.map_err(io::Error::from)
}

/// A raw socket for ICMP of a family, non-blocking, that gets packets of one type only.
pub(crate) fn icmp_socket(v6: bool, accepted: u8) -> io::Result<OwnedFd> {
    /// `SOL_RAW` and `ICMP_FILTER` of linux/icmp.h, `ICMPV6_FILTER` of linux/icmpv6.h.
    const SOL_RAW: libc::c_int = 255;
    const FILTER: libc::c_int = 1;
    let (family, protocol, level) = match v6 {
        false => (libc::AF_INET, libc::IPPROTO_ICMP, SOL_RAW),
        true => (libc::AF_INET6, libc::IPPROTO_ICMPV6, libc::IPPROTO_ICMPV6),
    };
    // SAFETY: socket takes three integers and returns a new descriptor or -1.
    let fd =
        unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let socket = owned(fd);
    // A bit that is set keeps its type out. IPv4's filter has 32 bits, IPv6's 256.
    let mut blocked = [u32::MAX; 8];
    blocked[usize::from(accepted / 32)] &= !(1 << (accepted % 32));
    let size = if v6 { size_of_val(&blocked) } else { size_of::<u32>() };
    let size = libc::socklen_t::try_from(size).map_err(io::Error::other)?;
    // SAFETY: the socket is open, and the value has at least the size given.
    let set = unsafe { libc::setsockopt(fd, level, FILTER, blocked.as_ptr().cast(), size) };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    // What is sent is not cut, whatever is known of the way: too much for the device is an error.
    let (level, name) = match v6 {
        false => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
        true => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    };
    let whole = libc::IP_PMTUDISC_PROBE;
    let size = libc::socklen_t::try_from(size_of_val(&whole)).map_err(io::Error::other)?;
    // SAFETY: the socket is open, and the value has the size given; both families number it alike.
    let set = unsafe { libc::setsockopt(fd, level, name, (&raw const whole).cast(), size) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}
