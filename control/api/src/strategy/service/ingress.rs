//! Validation of Ingresses, their classes, and NetworkPolicies.

use serde_json::Value;

use super::super::Change;
use super::super::checks::{
    Errors, immutable, label_selector, one_of, optional_name, optional_one_of, port_number, port_reference,
    problems, required, required_name,
};
use super::super::value::{is_empty, items, number, text};
use super::validation;
use crate::field::{FieldError, FieldPath};
use crate::names;

const PROTOCOLS: [&str; 3] = ["SCTP", "TCP", "UDP"];
/// How Ingresses said their class before there was a field.
const CLASS: &str = "kubernetes.io/ingress.class";
const PATH_TYPES: [&str; 3] = ["Exact", "ImplementationSpecific", "Prefix"];

/// A new Ingress says its class once, or twice the same.
pub(super) fn ingress_create(object: &Value, errors: &mut Errors) {
    let (named, annotated) = (&object["spec"]["ingressClassName"], &object["metadata"]["annotations"][CLASS]);
    if named.is_string() && annotated.is_string() && named != annotated {
        let path = FieldPath::new("annotations").child(CLASS);
        let detail = "must match `ingressClassName` when both are specified";
        errors.push(FieldError::invalid(&path, annotated.clone(), detail));
    }
}

pub(super) fn ingress(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    if is_empty(&spec["rules"]) && spec["defaultBackend"].is_null() {
        errors.push(FieldError::invalid(
            &path,
            Value::Array(Vec::new()),
            "either `defaultBackend` or `rules` must be specified",
        ));
    }
    optional_name(
        errors,
        &path.child("ingressClassName"),
        &spec["ingressClassName"],
        names::dns1123_subdomain,
    );
    if !spec["defaultBackend"].is_null() {
        backend(errors, &path.child("defaultBackend"), &spec["defaultBackend"]);
    }
    for (index, rule) in items(&spec["rules"]).iter().enumerate() {
        let path = path.child("rules").index(index);
        host(errors, &path.child("host"), text(&rule["host"]));
        let (http, path) = (&rule["http"], path.child("http").child("paths"));
        if http.is_null() {
            continue;
        }
        if is_empty(&http["paths"]) {
            errors.push(FieldError::required(&path, ""));
        }
        for (index, one) in items(&http["paths"]).iter().enumerate() {
            http_path(errors, &path.index(index), one);
        }
    }
    for (index, tls) in items(&spec["tls"]).iter().enumerate() {
        let path = path.child("tls").index(index);
        for (index, name) in items(&tls["hosts"]).iter().enumerate() {
            host(errors, &path.child("hosts").index(index), text(name));
        }
        optional_name(errors, &path.child("secretName"), &tls["secretName"], names::dns1123_subdomain);
    }
}

/// The status says where the ingress answers.
pub(super) fn ingress_status(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("status").child("loadBalancer").child("ingress");
    let ingress = items(&object["status"]["loadBalancer"]["ingress"]);
    validation::balancer_ingress(errors, &path, ingress, false);
}

fn host(errors: &mut Errors, path: &FieldPath, host: &str) {
    if host.is_empty() {
        return;
    }
    if host.parse::<std::net::IpAddr>().is_ok() {
        errors.push(FieldError::invalid(path, host, "must be a DNS name, not an IP address"));
    }
    let bad = if host.contains('*') {
        names::wildcard_dns1123_subdomain(host)
    } else {
        names::dns1123_subdomain(host)
    };
    problems(errors, path, host, bad);
}

fn http_path(errors: &mut Errors, path: &FieldPath, one: &Value) {
    let type_ = &one["pathType"];
    let at = path.child("pathType");
    if type_.is_null() {
        errors.push(FieldError::required(&at, "pathType must be specified"));
    } else {
        optional_one_of(errors, &at, type_, &PATH_TYPES);
    }
    let (value, at) = (text(&one["path"]), path.child("path"));
    let literal = matches!(text(type_), "Exact" | "Prefix");
    if (literal || !value.is_empty()) && !value.starts_with('/') {
        errors.push(FieldError::invalid(&at, value, "must be an absolute path"));
    }
    if literal && !value.is_empty() {
        for part in ["//", "/./", "/../", "%2f", "%2F"] {
            if value.contains(part) {
                errors.push(FieldError::invalid(&at, value, format!("must not contain '{part}'")));
            }
        }
        for end in ["/..", "/."] {
            if value.ends_with(end) {
                errors.push(FieldError::invalid(&at, value, format!("cannot end with '{end}'")));
            }
        }
    }
    backend(errors, &path.child("backend"), &one["backend"]);
}

fn backend(errors: &mut Errors, path: &FieldPath, backend: &Value) {
    let service = &backend["service"];
    match (service.is_null(), backend["resource"].is_null()) {
        (false, false) => {
            errors.push(FieldError::invalid(path, "", "cannot set both resource and service backends"));
        }
        (true, true) => errors.push(FieldError::required(path, "resource or service backend is required")),
        (true, false) => {
            for field in ["kind", "name"] {
                required(errors, &path.child("resource").child(field), &backend["resource"][field]);
            }
        }
        (false, true) => {
            let path = path.child("service");
            if required(errors, &path.child("name"), &service["name"]) {
                let name = text(&service["name"]);
                problems(errors, &path.child("name"), name, names::dns1123_label(name));
            }
            let (named, numbered) =
                (!is_empty(&service["port"]["name"]), number(&service["port"]["number"]) != 0);
            match (named, numbered) {
                (true, true) => {
                    errors.push(FieldError::invalid(&path, "", "cannot set both port name & port number"));
                }
                (true, false) => {
                    port_reference(errors, &path.child("port").child("name"), &service["port"]["name"])
                }
                (false, true) => {
                    port_number(errors, &path.child("port").child("number"), &service["port"]["number"])
                }
                (false, false) => errors.push(FieldError::required(&path, "port name or number is required")),
            }
        }
    }
}

pub(super) fn class(object: &Value, errors: &mut Errors) {
    let controller = text(&object["spec"]["controller"]);
    let path = FieldPath::new("spec").child("controller");
    if controller.len() > 250 {
        errors.push(FieldError::too_long(&path, 250));
    }
    let bad = match controller.split_once('/') {
        Some((domain, rest)) if !rest.is_empty() => names::dns1123_subdomain(domain),
        Some(_) | None => vec!["must be a domain-prefixed path (such as \"acme.io/foo\")".to_owned()],
    };
    problems(errors, &path, controller, bad);
    let (parameters, path) = (&object["spec"]["parameters"], FieldPath::new("spec").child("parameters"));
    if parameters.is_null() {
        return;
    }
    optional_name(errors, &path.child("apiGroup"), &parameters["apiGroup"], names::dns1123_subdomain);
    for field in ["kind", "name"] {
        required_name(errors, &path.child(field), &parameters[field], names::path_segment);
    }
    let (scope, namespace) = (&parameters["scope"], &parameters["namespace"]);
    one_of(errors, &path.child("scope"), scope, &["Cluster", "Namespace"]);
    let path = path.child("namespace");
    if scope == "Namespace" && namespace.is_null() {
        let detail = "`parameters.scope` is set to 'Namespace'";
        errors.push(FieldError::required(&path, detail));
    } else if scope == "Namespace" {
        problems(errors, &path, text(namespace), names::dns1123_label(text(namespace)));
    } else if scope == "Cluster" && !namespace.is_null() {
        errors.push(FieldError::forbidden(&path, "`parameters.scope` is set to 'Cluster'"));
    }
}

pub(super) fn class_update(change: &Change<'_>, errors: &mut Errors) {
    let path = FieldPath::new("spec").child("controller");
    immutable(errors, &path, &change.new["spec"]["controller"], &change.old["spec"]["controller"]);
}

pub(super) fn network_policy(object: &Value, errors: &mut Errors) {
    let path = FieldPath::new("spec");
    let spec = &object["spec"];
    label_selector(errors, &path.child("podSelector"), &spec["podSelector"]);
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        for (index, rule) in items(&spec[direction]).iter().enumerate() {
            let path = path.child(direction).index(index);
            for (index, port) in items(&rule["ports"]).iter().enumerate() {
                policy_port(errors, &path.child("ports").index(index), port);
            }
            for (index, peer) in items(&rule[peers]).iter().enumerate() {
                policy_peer(errors, &path.child(peers).index(index), peer);
            }
        }
    }
    let types = items(&spec["policyTypes"]);
    if types.len() > 2 {
        let detail = "may not specify more than two policyTypes";
        errors.push(FieldError::invalid(&path.child("policyTypes"), spec["policyTypes"].clone(), detail));
        return;
    }
    for (index, type_) in types.iter().enumerate() {
        let path = path.child("policyTypes").index(index);
        if !matches!(text(type_), "Ingress" | "Egress") {
            errors.push(FieldError::not_supported(&path, type_.clone(), &["Egress", "Ingress"]));
        }
    }
}

fn policy_port(errors: &mut Errors, path: &FieldPath, port: &Value) {
    optional_one_of(errors, &path.child("protocol"), &port["protocol"], &PROTOCOLS);
    if !port["port"].is_null() {
        port_reference(errors, &path.child("port"), &port["port"]);
    }
    let end = &port["endPort"];
    if end.is_null() {
        return;
    }
    let at = path.child("endPort");
    match port["port"].as_i64() {
        Some(start) if number(end) < start => {
            errors.push(FieldError::invalid(&at, start, "must be greater than or equal to `port`"));
        }
        Some(_) => port_number(errors, &at, end),
        None if port["port"].is_string() => {
            errors.push(FieldError::invalid(
                &at,
                end.clone(),
                "may not be specified when `port` is non-numeric",
            ));
        }
        None => errors.push(FieldError::invalid(
            &at,
            end.clone(),
            "may not be specified when `port` is not specified",
        )),
    }
}

fn policy_peer(errors: &mut Errors, path: &FieldPath, peer: &Value) {
    let selects = ["podSelector", "namespaceSelector"];
    let given = selects.iter().filter(|field| !peer[**field].is_null()).count();
    for field in selects {
        label_selector(errors, &path.child(field), &peer[field]);
    }
    let block = &peer["ipBlock"];
    if block.is_null() && given == 0 {
        errors.push(FieldError::required(path, "must specify a peer"));
    } else if !block.is_null() && given > 0 {
        let detail = "may not specify both ipBlock and another peer";
        errors.push(FieldError::forbidden(path, detail));
    }
    if block.is_null() {
        return;
    }
    let path = path.child("ipBlock");
    let cidr = text(&block["cidr"]);
    if !required(errors, &path.child("cidr"), &block["cidr"]) {
        return;
    }
    problems(errors, &path.child("cidr"), cidr, names::cidr(cidr));
    for (index, except) in items(&block["except"]).iter().enumerate() {
        let (path, except) = (path.child("except").index(index), text(except));
        problems(errors, &path, except, names::cidr(except));
        let (Ok(outer), Ok(inner)) =
            (cidr.parse::<ipnetwork::IpNetwork>(), except.parse::<ipnetwork::IpNetwork>())
        else {
            continue;
        };
        if !outer.contains(inner.network()) || outer.prefix() >= inner.prefix() {
            errors.push(FieldError::invalid(&path, except, "must be a strict subset of `cidr`"));
        }
    }
}
