//! Services of either family, with whatever flags, entered straight into the maps: the edge is tested without the planner.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Map, MapData};
use weft_agent_dataplane::maps::{Entry, MapSet as _, Table};
use weft_ebpf_abi::*;
use zerocopy::IntoBytes as _;

use crate::place::{CLIENT, CLIENT6, GATEWAY, GATEWAY6, NODE, NODE6, POD, POD6, Place, Running};

/// The place's addresses of one family.
#[derive(Clone, Copy)]
pub(crate) struct Family {
    pub(crate) gateway: IpAddr,
    pub(crate) pod: IpAddr,
    pub(crate) node: IpAddr,
    pub(crate) client: IpAddr,
}

pub(crate) const V4: Family = Family {
    gateway: IpAddr::V4(GATEWAY),
    pod: IpAddr::V4(POD),
    node: IpAddr::V4(NODE),
    client: IpAddr::V4(CLIENT),
};
pub(crate) const V6: Family = Family {
    gateway: IpAddr::V6(GATEWAY6),
    pod: IpAddr::V6(POD6),
    node: IpAddr::V6(NODE6),
    client: IpAddr::V6(CLIENT6),
};
pub(crate) const FAMILIES: [Family; 2] = [V4, V6];

impl Family {
    /// The cluster address of a Service; a client outside may also use it, as an external one.
    pub(crate) fn vip(&self, last: u8) -> SocketAddr {
        let ip = match self.node {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::new(10, 43, 0, last)),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::new(0xfd43, 0, 0, 0, 0, 0, 0, last.into())),
        };
        SocketAddr::new(ip, 80)
    }

    /// A port of the node.
    pub(crate) fn at_node(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.node, port)
    }
}

/// A Service in the maps.
#[derive(Clone, Copy, Default)]
pub(crate) struct Service<'a> {
    /// Last number of its address; names its list too.
    pub(crate) last: u8,
    pub(crate) node_port: u16,
    /// Flags towards clients outside and inside.
    pub(crate) flags: u32,
    pub(crate) affinity_seconds: u32,
    pub(crate) backends: &'a [SocketAddr],
}

fn row(key: &impl AsBytes, value: &impl AsBytes) -> Entry {
    (key.bytes(), value.bytes())
}

trait AsBytes {
    fn bytes(&self) -> Vec<u8>;
}

impl<T: zerocopy::IntoBytes + zerocopy::Immutable> AsBytes for T {
    fn bytes(&self) -> Vec<u8> {
        self.as_bytes().to_vec()
    }
}

/// The list of a Service over TCP, one for each family.
pub(crate) fn list(family: &Family, last: u8) -> u32 {
    1_000 + u32::from(last) * 2 + u32::from(family.node.is_ipv6())
}

/// The protocols that each Service has, with the list of each.
fn lists(family: &Family, last: u8) -> [(u8, u32); 3] {
    let list = list(family, last);
    [(TCP, list), (UDP, list + 10_000), (SCTP, list + 20_000)]
}

impl Running {
    /// Enters a Service, or changes it; backends that it had and others need stay until they are withdrawn.
    pub(crate) fn enter(&mut self, family: &Family, service: &Service<'_>) -> anyhow::Result<()> {
        for (protocol, list) in lists(family, service.last) {
            let backends: Vec<_> = service.backends.iter().map(|at| backend(*at, protocol)).collect();
            let known = |key: &BackendKey| {
                // The same backend keeps its generation.
                let generation = u32::from(key.port.get()) + 1;
                row(key, &BackendValue { generation, flags: BACKEND_ACTIVE, owner: 0 })
            };
            self.reconciler.maps.update(Table::Backends, &backends.iter().map(known).collect::<Vec<_>>())?;
            let slots: Vec<_> =
                (0..).zip(&backends).map(|(index, b)| row(&SlotKey { list, index }, b)).collect();
            self.reconciler.maps.update(Table::Slots, &slots)?;
            let count = u32::try_from(backends.len())?;
            let value = ServiceValue {
                list,
                count,
                affinity_seconds: service.affinity_seconds,
                flags: service.flags,
            };
            let vip = Address::from(family.vip(service.last).ip());
            let mut rows = Vec::new();
            for scope in [SCOPE_INTERNAL, SCOPE_EXTERNAL] {
                for (address, port) in [(vip, 80), (vip.any_of_family(), service.node_port)] {
                    rows.push(row(&ServiceKey { address, port: Port::new(port), protocol, scope }, &value));
                }
            }
            let refuse = ServiceKey { address: vip, port: Port::new(0), protocol: 0, scope: SCOPE_INTERNAL };
            rows.push(row(&refuse, &ServiceValue { count: 0, ..value }));
            self.reconciler.maps.update(Table::Services, &rows)?;
        }
        // The node's addresses are the reconciler's.
        self.sync()
    }

    /// Removes a backend: its flows end.
    pub(crate) fn withdraw(&mut self, at: SocketAddr) -> anyhow::Result<()> {
        let keys = [TCP, UDP, SCTP].map(|protocol| backend(at, protocol).as_bytes().to_vec());
        Ok(self.reconciler.maps.delete(Table::Backends, &keys)?)
    }

    /// Lets a backend keep its flows and get no others. The list still has it: a Service that leads elsewhere is entered after.
    pub(crate) fn drain(&mut self, at: SocketAddr) -> anyhow::Result<()> {
        let value = BackendValue { generation: u32::from(at.port()) + 1, flags: 0, owner: 0 };
        let rows = [TCP, UDP, SCTP].map(|protocol| row(&backend(at, protocol), &value));
        Ok(self.reconciler.maps.update(Table::Backends, &rows)?)
    }

    /// A Service with nothing but backends.
    pub(crate) fn plain(
        &mut self,
        family: &Family,
        last: u8,
        node_port: u16,
        backends: &[SocketAddr],
    ) -> anyhow::Result<()> {
        self.enter(family, &Service { last, node_port, backends, ..Service::default() })
    }
}

fn backend(at: SocketAddr, protocol: u8) -> BackendKey {
    BackendKey { address: Address::from(at.ip()), port: Port::new(at.port()), protocol, pad: 0 }
}

impl Place {
    /// Allows clients: an address, and how many of its last bits do not count.
    pub(crate) fn allow(&self, family: &Family, last: u8, clients: &[(IpAddr, u32)]) -> anyhow::Result<()> {
        let data = MapData::from_pin(self.pins.join("maps").join(names::SOURCES))?;
        let mut sources: LpmTrie<_, [u8; 20], u32> = LpmTrie::try_from(Map::LpmTrie(data))?;
        for (_, list) in lists(family, last) {
            for (ip, wild) in clients {
                let data = SourceData { list: list.to_be_bytes(), address: Address::from(*ip) };
                let mut bytes = [0; 20];
                bytes.copy_from_slice(data.as_bytes());
                sources.insert(&Key::new(160 - wild, bytes), 1, 0)?;
            }
        }
        Ok(())
    }
}
