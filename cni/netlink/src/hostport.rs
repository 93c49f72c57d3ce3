//! Ports of the node that lead to pods.
//!
//! One nftables table of our own in each family. Every mapping is an element of a map, so that a packet's cost doesn't grow
//! with the number of mappings, and a change is one element:
//!
//! ```text
//! table ip weft-hostports {
//!     map any       { type inet_proto . inet_service : ipv4_addr . inet_service }
//!     map addressed { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service }
//!     set near      { type ifname }
//!     chain ports {
//!         dnat ip to ip daddr . meta l4proto . th dport map @addressed
//!         fib daddr type local dnat ip to meta l4proto . th dport map @any
//!         meta mark set meta mark & ~MARK
//!     }
//!     chain prerouting  { type nat hook prerouting priority dstnat; iifname @near meta mark set meta mark | MARK; jump ports }
//!     chain output      { type nat hook output priority -100; ip saddr 127.0.0.0/8 meta mark set meta mark | MARK; jump ports }
//!     chain postrouting { type nat hook postrouting priority srcnat; meta mark & MARK == MARK masquerade fully-random }
//!     chain guard       { type filter hook prerouting priority raw; iifname != "lo" ip daddr 127.0.0.0/8 drop }
//! }
//! ```
//!
//! Who is near (on the pod's own bridge, the pod itself included) would get the pod's answer directly, from an address that it
//! never asked; so its packets take the way back through the node, as do those from loopback, which no pod can answer to.
//! For the latter the devices towards pods route loopback addresses; the guard keeps others from using that.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_netfilter::conntrack::{ProtoTuple, Protocol, Tuple};
use netlink_packet_netfilter::nftables::{
    DataAttribute, InetHookNumber, ListAttribute, NfTablesMessage, SetAttribute, SetElementAttribute,
    SetElementList, SetElementMessage, SetFlags, SetMessage,
};
use nix::errno::Errno;

use crate::nft::{self, Base, Change, FAMILIES, Family, Field};
use crate::{Class, Error};

const TABLE: &str = "weft-hostports";
const ANY: &str = "any";
const ADDRESSED: &str = "addressed";
const NEAR: &str = "near";

/// The bit of a packet's mark from here to its masquerading. Kubernetes, Calico, Cilium and the reference plugins leave it alone.
const MARK: u32 = 1 << 20;

/// `NF_IP_PRI_NAT_DST`, `NF_IP_PRI_NAT_SRC`, `NF_IP_PRI_RAW`.
const DSTNAT: i32 = -100;
const SRCNAT: i32 = 100;
const RAW: i32 = -300;

/// nft's names for types: their numbers, six bits each where they are strung together. The kernel keeps them for nft to show.
const INET_PROTO: u32 = 12;
const INET_SERVICE: u32 = 13;
const IPV4_ADDR: u32 = 7;
const IPV6_ADDR: u32 = 8;
const IFNAME: u32 = 41;
const IFNAME_BYTES: u32 = 16;

/// `NFTNL_UDATA_SET_KEYBYTEORDER`, 4 bytes, `BYTEORDER_HOST_ENDIAN`: without it nft can't show names of devices.
const IN_HOST_ORDER: [u8; 6] = {
    let [a, b, c, d] = 1u32.to_ne_bytes();
    [0, 4, a, b, c, d]
};

/// `NFT_SET_MAP`.
const IS_MAP: u32 = 8;

const UDP: u8 = 17;

/// Others may change a map between our look at it and our change; more often than this in a row is no accident.
const TRIES: u32 = 16;

/// A port of the node that leads to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// The node's address; `None` for every address of the pod's family.
    pub host: Option<IpAddr>,
    /// The node's port.
    pub port: u16,
    /// The number of the protocol: 6, 17 or 132.
    pub protocol: u8,
    /// The pod's address.
    pub pod: IpAddr,
    /// The pod's port.
    pub pod_port: u16,
}

/// One element of a set or map.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Element {
    set: &'static str,
    key: Vec<u8>,
    data: Option<Vec<u8>>,
}

/// Makes ports lead to pods that are reached by a device. Ports that do so already are no error.
///
/// # Errors
/// [`Class::Exists`] if a port leads to another pod.
pub fn add(ports: &[HostPort], device: &str) -> Result<(), Error> {
    for family in FAMILIES {
        let mut elements: Vec<Element> =
            ports.iter().filter(|port| Family::of(port.pod) == family).map(HostPort::element).collect();
        if !elements.is_empty() {
            elements.push(near(device));
            put(family, &elements)?;
            end_flows(family, &elements)?;
        }
    }
    Ok(())
}

/// Those of the ports that don't lead where they should.
///
/// # Errors
/// If the kernel can't be asked.
pub fn missing(ports: &[HostPort]) -> Result<Vec<HostPort>, Error> {
    let mut missing = Vec::new();
    for family in FAMILIES {
        let wanted: Vec<&HostPort> = ports.iter().filter(|port| Family::of(port.pod) == family).collect();
        if wanted.is_empty() {
            continue;
        }
        let present = elements(family)?;
        missing.extend(wanted.into_iter().filter(|port| !present.contains(&port.element())));
    }
    Ok(missing)
}

/// Removes all ports that lead to a pod's addresses. None is no error.
///
/// # Errors
/// If the kernel refuses.
pub fn remove(pod: &[IpAddr]) -> Result<(), Error> {
    FAMILIES.into_iter().try_for_each(|family| {
        let addresses: Vec<Vec<u8>> = pod
            .iter()
            .filter(|address| Family::of(**address) == family)
            .map(|address| nft::octets(*address))
            .collect();
        let leads_there = |element: &Element| {
            let data = element.data.as_deref();
            data.is_some_and(|data| addresses.iter().any(|address| data.starts_with(address)))
        };
        if addresses.is_empty() { Ok(()) } else { delete(family, || elements(family), leads_there) }
    })
}

/// Forgets that pods are reached by a device. One that isn't known is no error.
///
/// # Errors
/// If the kernel refuses.
pub fn forget_device(name: &str) -> Result<(), Error> {
    let gone = near(name);
    let there = |element: &Element| *element == gone;
    FAMILIES.into_iter().try_for_each(|family| delete(family, || dump(family, NEAR), there))
}

/// Removes the tables. One that is gone is no error.
///
/// # Errors
/// If the kernel refuses.
pub fn remove_all() -> Result<(), Error> {
    nft::remove_tables("remove the host ports", TABLE)
}

impl HostPort {
    fn element(&self) -> Element {
        let mut key = self.host.map(nft::octets).unwrap_or_default();
        key.extend([self.protocol, 0, 0, 0]);
        key.extend(port(self.port));
        let mut data = nft::octets(self.pod);
        data.extend(port(self.pod_port));
        Element { set: if self.host.is_some() { ADDRESSED } else { ANY }, key, data: Some(data) }
    }
}

/// A port in a word of its own.
fn port(number: u16) -> [u8; 4] {
    let [a, b] = number.to_be_bytes();
    [a, b, 0, 0]
}

fn near(device: &str) -> Element {
    Element { set: NEAR, key: nft::device_key(device), data: None }
}

/// Puts elements, with the table around them if it is missing.
fn put(family: Family, elements: &[Element]) -> Result<(), Error> {
    const OP: &str = "put the host ports";
    let changes = || elements.iter().map(|one| (NfTablesMessage::NewSetElement(one.message()), NLM_F_CREATE));
    for _ in 0..TRIES {
        match nft::batch(OP, family, changes().collect()) {
            Err(error) if error.class() == Class::NotFound => {}
            // Some kernels call a key that has other data busy.
            Err(Error::Refused { op, subject, errno: Errno::EBUSY }) => {
                return Err(Error::Refused { op, subject, errno: Errno::EEXIST });
            }
            other => return other,
        }
        match nft::batch(OP, family, table(family).into_iter().chain(changes()).collect()) {
            // Somebody else has made the table meanwhile.
            Err(error) if error.class() == Class::Exists => {}
            other => return other,
        }
    }
    Err(Error::Interrupted { op: OP })
}

/// Deletes the elements that are to go, as often as others change them meanwhile.
fn delete(
    family: Family,
    present: impl Fn() -> Result<Vec<Element>, Error>,
    goes: impl Fn(&Element) -> bool,
) -> Result<(), Error> {
    const OP: &str = "remove the host ports";
    for _ in 0..TRIES {
        let going: Vec<Element> = present()?.into_iter().filter(|element| goes(element)).collect();
        if going.is_empty() {
            return Ok(());
        }
        let changes: Vec<Change> =
            going.iter().map(|one| (NfTablesMessage::DeleteSetElement(one.message()), 0)).collect();
        match nft::batch(OP, family, changes) {
            Err(error) if error.class() == Class::NotFound => {}
            Ok(()) => return end_flows(family, &going),
            Err(error) => return Err(error),
        }
    }
    Err(Error::Interrupted { op: OP })
}

/// Ends the flows of UDP to ports that have begun or ceased to lead to a pod. A flow goes on as it began for as long as it has
/// packets: to nobody, or to a pod that is gone. TCP and SCTP begin anew by themselves.
fn end_flows(family: Family, changed: &[Element]) -> Result<(), Error> {
    let ports: Vec<u16> = changed.iter().filter_map(Element::udp_port).collect();
    if ports.is_empty() {
        return Ok(());
    }
    nft::end_flows("end the flows to host ports", family, |tuple| {
        let parts = tuple.iter().filter_map(|part| match part {
            Tuple::Proto(parts) => Some(parts),
            _ => None,
        });
        let parts: Vec<&ProtoTuple> = parts.flatten().collect();
        parts.contains(&&ProtoTuple::Protocol(Protocol::Udp))
            && ports.iter().any(|port| parts.contains(&&ProtoTuple::DestinationPort(*port)))
    })
}

fn elements(family: Family) -> Result<Vec<Element>, Error> {
    Ok([dump(family, ANY)?, dump(family, ADDRESSED)?].concat())
}

/// All elements; none if there is no table.
fn dump(family: Family, set: &'static str) -> Result<Vec<Element>, Error> {
    let attributes = vec![SetElementList::Table(TABLE.to_owned()), SetElementList::Set(set.to_owned())];
    let request = NfTablesMessage::GetSetElement(SetElementMessage { attributes });
    let found = nft::dump("list the host ports", family, request, |message| match message {
        NfTablesMessage::NewSetElement(message) => read(set, &message),
        _ => Vec::new(),
    });
    match found {
        Err(error) if error.class() == Class::NotFound => Ok(Vec::new()),
        other => other,
    }
}

fn read(set: &'static str, message: &SetElementMessage) -> Vec<Element> {
    let lists = message.attributes.iter().filter_map(|attribute| match attribute {
        SetElementList::Elements(elements) => Some(elements),
        _ => None,
    });
    let one = |element: &ListAttribute<SetElementAttribute>| {
        let ListAttribute::Element(attributes) = element else { return None };
        let (mut key, mut data) = (None, None);
        for attribute in attributes {
            match attribute {
                SetElementAttribute::Key(DataAttribute::Value(value)) => key = Some(value.clone()),
                SetElementAttribute::Data(DataAttribute::Value(value)) => data = Some(value.clone()),
                _ => {}
            }
        }
        Some(Element { set, key: key?, data })
    };
    lists.flatten().filter_map(one).collect()
}

impl Element {
    /// The node's port, if it is one of UDP.
    fn udp_port(&self) -> Option<u16> {
        // Behind the address, if there is one: a word of the protocol, a word of the port.
        let (protocol, port) = match *self.key.last_chunk::<8>()? {
            [protocol, _, _, _, high, low, _, _] => (protocol, u16::from_be_bytes([high, low])),
        };
        (self.set != NEAR && protocol == UDP).then_some(port)
    }

    fn message(&self) -> SetElementMessage {
        let mut element = vec![SetElementAttribute::Key(DataAttribute::Value(self.key.clone()))];
        element.extend(self.data.clone().map(|data| SetElementAttribute::Data(DataAttribute::Value(data))));
        SetElementMessage {
            attributes: vec![
                SetElementList::Table(TABLE.to_owned()),
                SetElementList::Set(self.set.to_owned()),
                SetElementList::Elements(vec![ListAttribute::Element(element)]),
            ],
        }
    }
}

/// The table with its maps, chains and rules, and without elements.
fn table(family: Family) -> Vec<Change> {
    let nat = |hook, priority| Some(Base { kind: "nat", hook, priority });
    let chain = |name, base| nft::new_chain(TABLE, name, base);
    let rule = |chain, parts: Vec<Vec<_>>| nft::new_rule(TABLE, chain, parts.concat());
    let jump = || vec![nft::jump("ports")];
    let mut changes = vec![nft::new_table(TABLE, NLM_F_EXCL)];
    changes.extend(sets(family));
    changes.extend([
        chain("ports", None),
        chain("prerouting", nat(InetHookNumber::PreRouting, DSTNAT)),
        chain("output", nat(InetHookNumber::LocalOut, DSTNAT)),
        chain("postrouting", nat(InetHookNumber::PostRouting, SRCNAT)),
        rule("ports", vec![nft::translate_by(ADDRESSED, family, true)]),
        rule("ports", vec![nft::for_this_host(), nft::translate_by(ANY, family, false)]),
        rule("ports", vec![nft::mark(MARK, false)]),
        rule("prerouting", vec![nft::by_device_of(NEAR), nft::mark(MARK, true)]),
        rule("prerouting", vec![jump()]),
    ]);
    if family == Family::V4 {
        let guard = Base { kind: "filter", hook: InetHookNumber::PreRouting, priority: RAW };
        let foreign = vec![nft::by_loopback(false), nft::of_loopback(Field::Destination), vec![nft::drop()]];
        changes.extend([
            rule("output", vec![nft::of_loopback(Field::Source), nft::mark(MARK, true)]),
            chain("guard", Some(guard)),
            rule("guard", foreign),
        ]);
    }
    changes.extend([
        rule("output", vec![jump()]),
        rule("postrouting", vec![nft::is_marked(MARK), vec![nft::masquerade()]]),
    ]);
    changes
}

fn sets(family: Family) -> [Change; 3] {
    let (address, bytes) = match family {
        Family::V4 => (IPV4_ADDR, 4),
        Family::V6 => (IPV6_ADDR, 16),
    };
    let mut names = set(3, NEAR, IFNAME, IFNAME_BYTES);
    names.push(SetAttribute::UserData(IN_HOST_ORDER.to_vec()));
    let strung = |types: &[u32]| types.iter().fold(0, |all, one| all << 6 | one);
    let map = |id, name: &str, key: &[u32], key_bytes| {
        let mut attributes = set(id, name, strung(key), key_bytes);
        attributes.extend([
            SetAttribute::Flags(SetFlags::from_bits_retain(IS_MAP)),
            SetAttribute::DataType(strung(&[address, INET_SERVICE])),
            SetAttribute::DataLen(bytes + 4),
        ]);
        attributes
    };
    [
        map(1, ANY, &[INET_PROTO, INET_SERVICE], 8),
        map(2, ADDRESSED, &[address, INET_PROTO, INET_SERVICE], bytes + 8),
        names,
    ]
    .map(|attributes| (NfTablesMessage::NewSet(SetMessage { attributes }), NLM_F_CREATE))
}

fn set(id: u32, name: &str, key_type: u32, key_bytes: u32) -> Vec<SetAttribute> {
    vec![
        SetAttribute::Table(TABLE.to_owned()),
        SetAttribute::Name(name.to_owned()),
        SetAttribute::Id(id),
        SetAttribute::KeyType(key_type),
        SetAttribute::KeyLen(key_bytes),
    ]
}
