//! Validation of Endpoints and EndpointSlices.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::Value;

use super::super::Change;
use super::super::checks::{
    Errors, immutable, one_of, optional_name, optional_one_of, port_number, problems, required,
};
use super::super::value::{is_empty, items, text};
use crate::field::{FieldError, FieldPath};
use crate::names;

const PROTOCOLS: [&str; 3] = ["SCTP", "TCP", "UDP"];
const ADDRESS_TYPES: [&str; 3] = ["FQDN", "IPv4", "IPv6"];
const MAX_ENDPOINTS: usize = 1000;
const MAX_ADDRESSES: usize = 100;
const MAX_HINTS: usize = 8;
const MAX_PORTS: usize = 20_000;

pub(super) fn endpoints(object: &Value, errors: &mut Errors) {
    for (index, subset) in items(&object["subsets"]).iter().enumerate() {
        let path = FieldPath::new("subsets").index(index);
        if is_empty(&subset["addresses"]) && is_empty(&subset["notReadyAddresses"]) {
            errors.push(FieldError::required(&path, "must specify `addresses` or `notReadyAddresses`"));
        }
        for list in ["addresses", "notReadyAddresses"] {
            for (index, address) in items(&subset[list]).iter().enumerate() {
                let path = path.child(list).index(index);
                endpoint_ip(errors, &path.child("ip"), text(&address["ip"]));
                optional_name(errors, &path.child("hostname"), &address["hostname"], names::dns1123_label);
                optional_name(
                    errors,
                    &path.child("nodeName"),
                    &address["nodeName"],
                    names::dns1123_subdomain,
                );
            }
        }
        let ports = items(&subset["ports"]);
        for (index, port) in ports.iter().enumerate() {
            let path = path.child("ports").index(index);
            if ports.len() > 1 {
                required(errors, &path.child("name"), &port["name"]);
            }
            optional_name(errors, &path.child("name"), &port["name"], names::dns1123_label);
            port_number(errors, &path.child("port"), &port["port"]);
            one_of(errors, &path.child("protocol"), &port["protocol"], &PROTOCOLS);
            optional_name(errors, &path.child("appProtocol"), &port["appProtocol"], names::qualified_name);
        }
    }
}

/// An endpoint is another machine's address as the node sees it: not here, not everyone.
fn endpoint_ip(errors: &mut Errors, path: &FieldPath, value: &str) {
    let bad = names::ip(value);
    if !bad.is_empty() {
        return problems(errors, path, value, bad);
    }
    let Ok(address) = value.parse::<IpAddr>() else { return };
    let (link_local, link_multicast) = match address {
        IpAddr::V4(v4) => (v4.is_link_local(), v4.octets()[..3] == [224, 0, 0]),
        IpAddr::V6(v6) => (v6.is_unicast_link_local(), v6.segments()[0] & 0xff0f == 0xff02),
    };
    let rules = [
        (address.is_unspecified(), format!("may not be unspecified ({value})")),
        (address.is_loopback(), "may not be in the loopback range (127.0.0.0/8, ::1/128)".to_owned()),
        (link_local, "may not be in the link-local range (169.254.0.0/16, fe80::/10)".to_owned()),
        (link_multicast, "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)".to_owned()),
    ];
    for (broken, detail) in rules {
        if broken {
            errors.push(FieldError::invalid(path, value, detail));
        }
    }
}

pub(super) fn slice(object: &Value, errors: &mut Errors) {
    let type_ = &object["addressType"];
    let path = FieldPath::new("addressType");
    if required(errors, &path, type_) {
        optional_one_of(errors, &path, type_, &ADDRESS_TYPES);
    }
    let (list, path) = (items(&object["endpoints"]), FieldPath::new("endpoints"));
    if list.len() > MAX_ENDPOINTS {
        errors.push(FieldError::too_many(&path, list.len(), MAX_ENDPOINTS));
        return;
    }
    for (index, endpoint) in list.iter().enumerate() {
        slice_endpoint(errors, &path.index(index), endpoint, text(type_));
    }
    slice_ports(errors, &FieldPath::new("ports"), &object["ports"]);
}

fn slice_endpoint(errors: &mut Errors, path: &FieldPath, endpoint: &Value, type_: &str) {
    let (addresses, at) = (items(&endpoint["addresses"]), path.child("addresses"));
    if addresses.is_empty() {
        errors.push(FieldError::required(&at, "must contain at least 1 address"));
    } else if addresses.len() > MAX_ADDRESSES {
        errors.push(FieldError::too_many(&at, addresses.len(), MAX_ADDRESSES));
    }
    for (index, address) in addresses.iter().enumerate() {
        let (path, address) = (at.index(index), text(address));
        let parsed = address.parse::<IpAddr>().ok();
        match type_ {
            "IPv4" if !parsed.is_some_and(|address| address.is_ipv4()) => {
                errors.push(FieldError::invalid(&path, address, "must be a valid IPv4 address"));
            }
            "IPv6" if !parsed.is_some_and(|address| address.is_ipv6()) => {
                errors.push(FieldError::invalid(&path, address, "must be a valid IPv6 address"));
            }
            "IPv4" | "IPv6" => endpoint_ip(errors, &path, address),
            "FQDN" => problems(errors, &path, address, names::dns1123_subdomain(address)),
            _ => {}
        }
    }
    optional_name(errors, &path.child("nodeName"), &endpoint["nodeName"], names::dns1123_subdomain);
    optional_name(errors, &path.child("hostname"), &endpoint["hostname"], names::dns1123_label);
    slice_hints(errors, &path.child("hints"), &endpoint["hints"]);
}

/// Whom an endpoint is for: at most so many zones and nodes, each once.
fn slice_hints(errors: &mut Errors, path: &FieldPath, hints: &Value) {
    for field in ["forZones", "forNodes"] {
        let (list, path) = (items(&hints[field]), path.child(field));
        if list.len() > MAX_HINTS {
            errors.push(FieldError::too_many(&path, list.len(), MAX_HINTS));
            return;
        }
        let mut seen = BTreeSet::new();
        for (index, one) in list.iter().enumerate() {
            let (name, path) = (text(&one["name"]), path.index(index).child("name"));
            if !seen.insert(name) {
                errors.push(FieldError::duplicate(&path, name));
            } else if required(errors, &path, &one["name"]) {
                problems(
                    errors,
                    &path,
                    name,
                    if field == "forZones" {
                        names::label_value(name)
                    } else {
                        names::dns1123_subdomain(name)
                    },
                );
            }
        }
    }
}

fn slice_ports(errors: &mut Errors, path: &FieldPath, ports: &Value) {
    let ports = items(ports);
    if ports.len() > MAX_PORTS {
        errors.push(FieldError::too_many(path, ports.len(), MAX_PORTS));
        return;
    }
    let mut seen = BTreeSet::new();
    for (index, port) in ports.iter().enumerate() {
        let path = path.index(index);
        let name = text(&port["name"]);
        optional_name(errors, &path.child("name"), &port["name"], names::dns1123_label);
        if !seen.insert(name) {
            errors.push(FieldError::duplicate(&path.child("name"), name));
        }
        if !port["port"].is_null() {
            port_number(errors, &path.child("port"), &port["port"]);
        }
        one_of(errors, &path.child("protocol"), &port["protocol"], &PROTOCOLS);
        optional_name(errors, &path.child("appProtocol"), &port["appProtocol"], names::qualified_name);
    }
}

pub(super) fn slice_update(change: &Change<'_>, errors: &mut Errors) {
    immutable(errors, &FieldPath::new("addressType"), &change.new["addressType"], &change.old["addressType"]);
}
