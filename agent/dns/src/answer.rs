//! A pure decision: what a question is answered with.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use hickory_proto::rr::rdata::{A, AAAA, CNAME, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};

use crate::index::{Endpoint, Index, Port, Service, Target};

#[cfg(test)]
mod tests;

/// Seconds that an answer may be kept: short, since names follow the cluster.
const TTL_SECONDS: u32 = 5;
/// Version of the specification that the names follow.
const SCHEMA_VERSION: &str = "1.1.0";

/// The domain that is answered for.
#[derive(Clone, Debug)]
pub(crate) struct Zone {
    origin: Name,
    services: Name,
}

/// What to do with a question.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Answer {
    /// The name exists; these are its records of the type asked for, possibly none.
    Records(Vec<Record>),
    /// The name is another's; the alias, and the name to resolve elsewhere.
    Alias(Box<Record>, Name),
    /// There is no such name.
    NoSuchName,
    /// Not a name of the cluster: ask the upstream resolvers.
    Elsewhere,
    /// The names of the cluster aren't known yet.
    NotReady,
}

impl Zone {
    /// `None` if `domain` is no domain name.
    pub(crate) fn new(domain: &str) -> Option<Self> {
        let origin = Name::from_ascii(format!("{}.", domain.trim_end_matches('.'))).ok()?.to_lowercase();
        let services = origin.prepend_label("svc").ok()?;
        Some(Self { origin, services })
    }

    /// The record that goes with "no such name" and "no such record" (RFC 2308 §3).
    pub(crate) fn start_of_authority(&self) -> Option<Record> {
        let server = self.origin.prepend_label("dns").ok()?.prepend_label("ns").ok()?;
        let contact = self.origin.prepend_label("hostmaster").ok()?;
        let soa = SOA::new(server, contact, 1, 7200, 1800, 86400, TTL_SECONDS);
        Some(Record::from_rdata(self.origin.clone(), TTL_SECONDS, RData::SOA(soa)))
    }

    /// Decides on one question.
    pub(crate) fn answer(&self, index: &Index, name: &Name, kind: RecordType) -> Answer {
        let lower = name.to_lowercase();
        if let Some(address) = reverse_address(&lower) {
            return self.reverse(index, name, address, kind);
        }
        if !self.origin.zone_of(&lower) {
            return Answer::Elsewhere;
        }
        if !index.is_complete() {
            return Answer::NotReady;
        }
        // `num_labels` does not count a leading `*`.
        let depth = lower.iter().len() - self.origin.iter().len();
        let labels: Vec<String> =
            lower.iter().take(depth).map(|label| String::from_utf8_lossy(label).into_owned()).collect();
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        match labels.as_slice() {
            [] if kind == RecordType::SOA => Answer::Records(self.start_of_authority().into_iter().collect()),
            [] | ["svc" | "pod"] => Answer::Records(Vec::new()),
            ["dns-version"] => self.version(name, kind),
            [namespace, "svc" | "pod"] if index.has_namespace(namespace) => Answer::Records(Vec::new()),
            [service, namespace, "svc"] => self.service(index, name, (namespace, service), kind),
            [first, service, namespace, "svc"] => {
                self.below_service(index, name, (namespace, service, first), kind)
            }
            [port, protocol, service, namespace, "svc"] => {
                self.port(index, name, (namespace, service), (port, protocol), kind)
            }
            [dashed, namespace, "pod"] if index.has_namespace(namespace) => pod(name, dashed, kind),
            _ => Answer::NoSuchName,
        }
    }

    fn version(&self, name: &Name, kind: RecordType) -> Answer {
        let text = RData::TXT(TXT::new(vec![SCHEMA_VERSION.to_owned()]));
        Answer::Records(if kind == RecordType::TXT { vec![record(name, text)] } else { Vec::new() })
    }

    fn service(
        &self,
        index: &Index,
        name: &Name,
        (namespace, service): (&str, &str),
        kind: RecordType,
    ) -> Answer {
        let Some(found) = index.service(namespace, service) else { return Answer::NoSuchName };
        match &found.target {
            Target::Alias(target) => alias(name, target),
            Target::Addresses(_) | Target::Endpoints if kind == RecordType::SRV => {
                Answer::Records(self.ports(index, name, (namespace, service), found, |_| true))
            }
            Target::Addresses(addresses) => {
                Answer::Records(addresses_of(name, addresses.iter().copied(), kind))
            }
            Target::Endpoints => {
                let mut endpoints = endpoints(index, namespace, service, found).peekable();
                if endpoints.peek().is_none() {
                    return Answer::NoSuchName;
                }
                Answer::Records(addresses_of(name, endpoints.map(|(endpoint, _)| endpoint.address), kind))
            }
        }
    }

    /// `<host name or address>.<headless service>`, or `_tcp.<service>`.
    fn below_service(
        &self,
        index: &Index,
        name: &Name,
        (namespace, service, first): (&str, &str, &str),
        kind: RecordType,
    ) -> Answer {
        let Some(found) = index.service(namespace, service) else { return Answer::NoSuchName };
        if let Some(protocol) = first.strip_prefix('_') {
            let known = found.ports.iter().any(|port| port.protocol == protocol);
            return if known { Answer::Records(Vec::new()) } else { Answer::NoSuchName };
        }
        if found.target != Target::Endpoints {
            return Answer::NoSuchName;
        }
        let mut named = endpoints(index, namespace, service, found)
            .filter(|(endpoint, _)| endpoint.label() == first)
            .peekable();
        if named.peek().is_none() {
            return Answer::NoSuchName;
        }
        Answer::Records(addresses_of(name, named.map(|(endpoint, _)| endpoint.address), kind))
    }

    fn port(
        &self,
        index: &Index,
        name: &Name,
        (namespace, service): (&str, &str),
        (port, protocol): (&str, &str),
        kind: RecordType,
    ) -> Answer {
        let (Some(port), Some(protocol)) = (port.strip_prefix('_'), protocol.strip_prefix('_')) else {
            return Answer::NoSuchName;
        };
        let Some(found) = index.service(namespace, service) else { return Answer::NoSuchName };
        let wanted = |candidate: &Port| candidate.name == port && candidate.protocol == protocol;
        let records = self.ports(index, name, (namespace, service), found, wanted);
        if records.is_empty() {
            return Answer::NoSuchName;
        }
        Answer::Records(if kind == RecordType::SRV { records } else { Vec::new() })
    }

    /// SRV records: one a port, or one an endpoint and port of a headless Service.
    fn ports(
        &self,
        index: &Index,
        name: &Name,
        (namespace, service): (&str, &str),
        found: &Service,
        wanted: impl Fn(&Port) -> bool,
    ) -> Vec<Record> {
        let named = |port: &&Port| !port.name.is_empty() && wanted(port);
        let target = |labels: &[&str]| self.below(labels);
        let mut pairs: Vec<(u16, Option<Name>)> = Vec::new();
        if found.target == Target::Endpoints {
            for (endpoint, ports) in endpoints(index, namespace, service, found) {
                let host = target(&[&endpoint.label(), service, namespace]);
                pairs.extend(ports.iter().filter(named).map(|port| (port.port, host.clone())));
            }
        } else {
            let host = target(&[service, namespace]);
            pairs.extend(found.ports.iter().filter(named).map(|port| (port.port, host.clone())));
        }
        // An endpoint with a host name and an address of each family has one name.
        let mut seen = HashSet::new();
        pairs.retain(|pair| seen.insert(pair.clone()));
        let weight = u16::try_from(100 / pairs.len().max(1)).unwrap_or(1).max(1);
        let srv = |(port, host): (u16, Option<Name>)| Some(RData::SRV(SRV::new(0, weight, port, host?)));
        pairs.into_iter().filter_map(srv).map(|data| record(name, data)).collect()
    }

    /// A name below `svc.<domain>`.
    fn below(&self, labels: &[&str]) -> Option<Name> {
        let label = |name: Name, label: &&str| name.prepend_label(*label).ok();
        labels.iter().rev().try_fold(self.services.clone(), label)
    }

    fn reverse(&self, index: &Index, name: &Name, address: IpAddr, kind: RecordType) -> Answer {
        let names = index.names_of(address);
        if names.is_empty() {
            return Answer::Elsewhere;
        }
        if kind != RecordType::PTR {
            return Answer::Records(Vec::new());
        }
        let labels =
            |labels: &Vec<String>| self.below(&labels.iter().map(String::as_str).collect::<Vec<_>>());
        let pointers = names.iter().filter_map(labels).map(|target| record(name, RData::PTR(PTR(target))));
        Answer::Records(pointers.collect())
    }
}

/// The endpoints that a headless Service's name stands for, with their slice's ports.
fn endpoints<'a>(
    index: &'a Index,
    namespace: &str,
    service: &str,
    found: &Service,
) -> impl Iterator<Item = (&'a Endpoint, &'a [Port])> {
    let all = found.publish_not_ready;
    index
        .slices(namespace, service)
        .flat_map(|slice| slice.endpoints.iter().map(|endpoint| (endpoint, slice.ports.as_slice())))
        .filter(move |(endpoint, _)| endpoint.ready || all)
}

fn record(name: &Name, data: RData) -> Record {
    Record::from_rdata(name.clone(), TTL_SECONDS, data)
}

fn addresses_of(name: &Name, addresses: impl Iterator<Item = IpAddr>, kind: RecordType) -> Vec<Record> {
    let data = |address| match (address, kind) {
        (IpAddr::V4(address), RecordType::A | RecordType::ANY) => Some(RData::A(A(address))),
        (IpAddr::V6(address), RecordType::AAAA | RecordType::ANY) => Some(RData::AAAA(AAAA(address))),
        _ => None,
    };
    addresses.filter_map(data).map(|data| record(name, data)).collect()
}

fn alias(name: &Name, target: &str) -> Answer {
    match Name::from_ascii(format!("{}.", target.trim_end_matches('.'))) {
        Ok(target) => Answer::Alias(Box::new(record(name, RData::CNAME(CNAME(target.clone())))), target),
        // The API refuses such a name; a Service of another server may still carry one.
        Err(_) => Answer::NoSuchName,
    }
}

/// `10-42-0-7.<namespace>.pod` or `fd42--7.<namespace>.pod`: the address that the name itself says.
fn pod(name: &Name, dashed: &str, kind: RecordType) -> Answer {
    let v4 = dashed.replace('-', ".").parse::<Ipv4Addr>().map(IpAddr::V4);
    let Ok(address) = v4.or_else(|_| dashed.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::V6)) else {
        return Answer::NoSuchName;
    };
    Answer::Records(addresses_of(name, std::iter::once(address), kind))
}

/// The address of a whole reverse name.
fn reverse_address(name: &Name) -> Option<IpAddr> {
    let full = match name.num_labels() {
        6 => 32,
        34 => 128,
        _ => return None,
    };
    let network = name.parse_arpa_name().ok()?;
    (network.prefix_len() == full).then(|| network.addr())
}
