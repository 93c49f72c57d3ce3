//! Rows of Services and what surrounds them.

use std::collections::BTreeSet;

use jiff::Timestamp;
use serde_json::Value;

use super::duration::age;
use super::format::{NONE, UNSET, first_three, items, joined, labels, name, number, selector, text, text_or};

pub(super) fn row(group: &str, kind: &str, object: &Value, now: Timestamp) -> Option<Vec<Value>> {
    let spec = &object["spec"];
    Some(match (group, kind) {
        ("", "Service") => service(object, now),
        ("", "Endpoints") => vec![name(object), endpoints(object).into(), age(object, now)],
        ("discovery.k8s.io", "EndpointSlice") => endpoint_slice(object, now),
        ("networking.k8s.io", "Ingress") => ingress(object, now),
        ("networking.k8s.io", "IngressClass") => {
            vec![
                name(object),
                text(&spec["controller"]).into(),
                ingress_parameters(spec).into(),
                age(object, now),
            ]
        }
        ("networking.k8s.io", "NetworkPolicy") => {
            vec![name(object), selector(&spec["podSelector"]).into(), age(object, now)]
        }
        ("networking.k8s.io", "ServiceCIDR") => {
            vec![name(object), joined(&spec["cidrs"], ",").into(), age(object, now)]
        }
        ("networking.k8s.io", "IPAddress") => vec![name(object), parent(&spec["parentRef"]).into()],
        _ => return None,
    })
}

fn service(object: &Value, now: Timestamp) -> Vec<Value> {
    let spec = &object["spec"];
    let ports: Vec<_> = items(&spec["ports"]).iter().map(service_port).collect();
    let ports = if ports.is_empty() { NONE.to_owned() } else { ports.join(",") };
    vec![
        name(object),
        text(&spec["type"]).into(),
        text_or(&spec["clusterIPs"][0], NONE).into(),
        external_ip(object).into(),
        ports.into(),
        age(object, now),
        labels(&spec["selector"]).into(),
    ]
}

fn service_port(port: &Value) -> String {
    let (number, protocol) = (number(&port["port"]), text(&port["protocol"]));
    match port["nodePort"].as_i64() {
        Some(node_port) if node_port > 0 => format!("{number}:{node_port}/{protocol}"),
        Some(_) | None => format!("{number}/{protocol}"),
    }
}

fn external_ip(service: &Value) -> String {
    let spec = &service["spec"];
    let external = joined(&spec["externalIPs"], ",");
    match text(&spec["type"]) {
        "ClusterIP" | "NodePort" if external.is_empty() => NONE.to_owned(),
        "ClusterIP" | "NodePort" => external,
        "LoadBalancer" => match (load_balancer(service), external) {
            (balancer, external) if balancer.is_empty() && external.is_empty() => "<pending>".to_owned(),
            (balancer, external) if balancer.is_empty() => external,
            (balancer, external) if external.is_empty() => balancer,
            (balancer, external) => format!("{balancer},{external}"),
        },
        "ExternalName" => text(&spec["externalName"]).to_owned(),
        _ => "<unknown>".to_owned(),
    }
}

/// Addresses or names of the load balancer, sorted, each once.
fn load_balancer(object: &Value) -> String {
    let ingress = items(&object["status"]["loadBalancer"]["ingress"]).iter();
    let addresses: BTreeSet<_> = ingress.map(|one| text_or(&one["ip"], text(&one["hostname"]))).collect();
    addresses.into_iter().filter(|address| !address.is_empty()).collect::<Vec<_>>().join(",")
}

fn endpoints(object: &Value) -> String {
    let subsets = items(&object["subsets"]);
    if subsets.is_empty() {
        return NONE.to_owned();
    }
    let mut all = Vec::new();
    for subset in subsets {
        let addresses = items(&subset["addresses"]).iter().map(|one| text(&one["ip"]));
        let ports = items(&subset["ports"]);
        if ports.is_empty() {
            all.extend(addresses.clone().map(str::to_owned));
        }
        for port in ports {
            let port = number(&port["port"]);
            all.extend(addresses.clone().map(|ip| host_port(ip, port)));
        }
    }
    first_three(&all)
}

fn host_port(ip: &str, port: i64) -> String {
    if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") }
}

fn endpoint_slice(object: &Value, now: Timestamp) -> Vec<Value> {
    let port = |port: &Value| {
        port["port"]
            .as_i64()
            .map_or_else(|| port["name"].as_str().unwrap_or("*").to_owned(), |port| port.to_string())
    };
    let ports: Vec<_> = items(&object["ports"]).iter().map(port).collect();
    let addresses = items(&object["endpoints"]).iter().flat_map(|one| items(&one["addresses"]));
    let addresses: Vec<_> = addresses.map(|address| text(address).to_owned()).collect();
    let shown = |list: &[String]| match first_three(list) {
        list if list.is_empty() => UNSET.to_owned(),
        list => list,
    };
    vec![
        name(object),
        text(&object["addressType"]).into(),
        shown(&ports).into(),
        shown(&addresses).into(),
        age(object, now),
    ]
}

fn ingress(object: &Value, now: Timestamp) -> Vec<Value> {
    let spec = &object["spec"];
    let hosts = items(&spec["rules"]).iter().map(|rule| text(&rule["host"])).filter(|host| !host.is_empty());
    let hosts: Vec<_> = hosts.map(str::to_owned).collect();
    let hosts = if hosts.is_empty() { "*".to_owned() } else { first_three(&hosts) };
    let ports = if items(&spec["tls"]).is_empty() { "80" } else { "80, 443" };
    vec![
        name(object),
        text_or(&spec["ingressClassName"], NONE).into(),
        hosts.into(),
        load_balancer(object).into(),
        ports.into(),
        age(object, now),
    ]
}

fn ingress_parameters(spec: &Value) -> String {
    let parameters = &spec["parameters"];
    if parameters.is_null() {
        return NONE.to_owned();
    }
    let group = match text(&parameters["apiGroup"]) {
        "" => String::new(),
        group => format!(".{group}"),
    };
    format!("{}{group}/{}", text(&parameters["kind"]), text(&parameters["name"]))
}

fn parent(reference: &Value) -> String {
    let parts = ["resource", "group", "namespace", "name"].map(|field| text(&reference[field]));
    let [resource, group, namespace, name] = parts;
    let resource = if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") };
    if namespace.is_empty() { format!("{resource}/{name}") } else { format!("{resource}/{namespace}/{name}") }
}
