//! NetworkPolicy as the API describes it, slowly: no identities, no sets, no state.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde_json::{Map, Value};
use weft_ebpf_abi::{SCTP, TCP, UDP};

/// A pod as a packet's end.
pub(super) struct End<'a> {
    pub(super) namespace: &'a str,
    pub(super) namespace_labels: &'a Value,
    pub(super) labels: &'a Value,
    pub(super) ip: IpAddr,
    /// Protocol, name and number.
    pub(super) ports: &'a [(u8, String, u16)],
}

/// A packet's protocol and destination port.
pub(super) type Port = (u8, u16);

/// Whether these policies (namespace and spec) let a packet out of `from` and into `to`.
pub(super) fn allowed(policies: &[(&str, &Value)], from: &End<'_>, to: &End<'_>, port: Port) -> bool {
    from.ip == to.ip
        || one_way(policies, from, to, to, "Egress", port) && one_way(policies, to, from, to, "Ingress", port)
}

fn one_way(
    policies: &[(&str, &Value)],
    subject: &End<'_>,
    peer: &End<'_>,
    to: &End<'_>,
    kind: &str,
    port: Port,
) -> bool {
    let (rules, peers) = if kind == "Egress" { ("egress", "to") } else { ("ingress", "from") };
    let mut isolated = false;
    for (namespace, spec) in policies {
        if *namespace != subject.namespace || !selects(&spec["podSelector"], subject.labels) {
            continue;
        }
        let declared = spec["policyTypes"].as_array().filter(|types| !types.is_empty());
        let applies = match declared {
            Some(types) => types.iter().any(|t| t == kind),
            None => kind == "Ingress" || spec["egress"].as_array().is_some_and(|rules| !rules.is_empty()),
        };
        if !applies {
            continue;
        }
        isolated = true;
        for rule in spec[rules].as_array().into_iter().flatten() {
            let any_peer = rule[peers].as_array().is_none_or(Vec::is_empty);
            let peer_ok = any_peer || list(&rule[peers]).iter().any(|one| is_peer(one, namespace, peer));
            let any_port = rule["ports"].as_array().is_none_or(Vec::is_empty);
            let port_ok = any_port || list(&rule["ports"]).iter().any(|one| is_port(one, to, port));
            if peer_ok && port_ok {
                return true;
            }
        }
    }
    !isolated
}

fn list(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

fn is_peer(peer: &Value, namespace: &str, end: &End<'_>) -> bool {
    if let Some(block) = peer.get("ipBlock") {
        let within = |text: &Value| {
            text.as_str().and_then(|t| t.parse::<IpNetwork>().ok()).is_some_and(|n| n.contains(end.ip))
        };
        return within(&block["cidr"]) && !list(&block["except"]).iter().any(within);
    }
    let namespace_ok = match peer.get("namespaceSelector") {
        Some(selector) => selects(selector, end.namespace_labels),
        None => end.namespace == namespace,
    };
    namespace_ok && peer.get("podSelector").is_none_or(|selector| selects(selector, end.labels))
}

fn is_port(rule: &Value, to: &End<'_>, (protocol, port): Port) -> bool {
    let wanted = match rule["protocol"].as_str() {
        None | Some("TCP") => TCP,
        Some("UDP") => UDP,
        Some("SCTP") => SCTP,
        Some(other) => panic!("no protocol: {other}"),
    };
    let number = match &rule["port"] {
        Value::Null => true,
        Value::String(name) => {
            to.ports.iter().any(|(p, n, number)| *p == protocol && n == name && *number == port)
        }
        number @ (Value::Number(_) | Value::Bool(_) | Value::Array(_) | Value::Object(_)) => {
            let first = number.as_u64().unwrap_or(0);
            (first..=rule["endPort"].as_u64().unwrap_or(first)).contains(&u64::from(port))
        }
    };
    wanted == protocol && number
}

fn selects(selector: &Value, labels: &Value) -> bool {
    let empty = Map::new();
    let labels = labels.as_object().unwrap_or(&empty);
    let exact = selector["matchLabels"].as_object().unwrap_or(&empty);
    exact.iter().all(|(key, value)| labels.get(key) == Some(value))
        && list(&selector["matchExpressions"]).iter().all(|one| {
            let value = one["key"].as_str().and_then(|key| labels.get(key));
            let listed = value.is_some_and(|v| list(&one["values"]).contains(v));
            match one["operator"].as_str() {
                Some("In") => listed,
                Some("NotIn") => !listed,
                Some("Exists") => value.is_some(),
                Some("DoesNotExist") => value.is_none(),
                other => panic!("no operator: {other:?}"),
            }
        })
}
