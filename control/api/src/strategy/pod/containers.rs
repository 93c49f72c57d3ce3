//! Validation of containers.

use std::collections::BTreeSet;

use serde_json::Value;

use super::super::checks::{Errors, one_of, optional_one_of, port_number, problems, required, required_name};
use super::super::value::{is_empty, items, number, text};
use super::volumes::Volumes;
use super::{environment, probes, resources, security, volumes};
use crate::field::{FieldError, FieldPath};
use crate::names;

const PROTOCOLS: [&str; 3] = ["SCTP", "TCP", "UDP"];
const PULL_POLICIES: [&str; 3] = ["Always", "IfNotPresent", "Never"];
const MESSAGE_POLICIES: [&str; 2] = ["FallbackToLogsOnError", "File"];
const RESTART_POLICIES: [&str; 3] = ["Always", "Never", "OnFailure"];
const SIDECAR_ONLY: &str = "may not be set for init containers without restartPolicy=Always";

/// The app and init containers of a pod; `known` are its volumes.
pub(super) fn validate(errors: &mut Errors, path: &FieldPath, spec: &Value, known: &Volumes<'_>) {
    let apps = items(&spec["containers"]);
    let list = path.child("containers");
    if apps.is_empty() {
        errors.push(FieldError::required(&list, ""));
    }
    let mut seen = BTreeSet::new();
    for (index, container) in apps.iter().enumerate() {
        let path = list.index(index);
        common(errors, &path, container, known);
        unique_name(errors, &path, container, &mut seen);
        lifecycle(errors, &path, container);
    }
    host_ports(errors, &list, apps);
    let list = path.child("initContainers");
    let inits = items(&spec["initContainers"]);
    for (index, container) in inits.iter().enumerate() {
        let path = list.index(index);
        common(errors, &path, container, known);
        unique_name(errors, &path, container, &mut seen);
        if container["restartPolicy"] == "Always" {
            lifecycle(errors, &path, container);
        } else {
            for field in ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"] {
                if !container[field].is_null() {
                    errors.push(FieldError::forbidden(&path.child(field), SIDECAR_ONLY));
                }
            }
        }
        host_ports(errors, &list, std::slice::from_ref(container));
    }
    if spec["hostNetwork"] == true {
        host_network(errors, &path.child("containers"), apps);
        host_network(errors, &list, inits);
    }
}

/// Ephemeral containers, which a debugger adds to a running pod.
pub(super) fn ephemeral(errors: &mut Errors, path: &FieldPath, spec: &Value, known: &Volumes<'_>) {
    let others = || items(&spec["containers"]).iter().chain(items(&spec["initContainers"]));
    let mut seen: BTreeSet<&str> = others().map(|one| text(&one["name"])).collect();
    for (index, container) in items(&spec["ephemeralContainers"]).iter().enumerate() {
        let path = path.index(index);
        common(errors, &path, container, known);
        unique_name(errors, &path, container, &mut seen);
        let target = text(&container["targetContainerName"]);
        if !target.is_empty() && !others().any(|one| one["name"] == target) {
            errors.push(FieldError::not_found(&path.child("targetContainerName"), target));
        }
        for field in ["ports", "livenessProbe", "readinessProbe", "startupProbe", "lifecycle", "resources"] {
            if !is_empty(&container[field]) {
                errors.push(FieldError::forbidden(
                    &path.child(field),
                    "cannot be set for an Ephemeral Container",
                ));
            }
        }
    }
}

fn unique_name<'a>(
    errors: &mut Errors,
    path: &FieldPath,
    container: &'a Value,
    seen: &mut BTreeSet<&'a str>,
) {
    let name = text(&container["name"]);
    if !name.is_empty() && !seen.insert(name) {
        errors.push(FieldError::duplicate(&path.child("name"), name));
    }
}

fn common(errors: &mut Errors, path: &FieldPath, container: &Value, known: &Volumes<'_>) {
    required_name(errors, &path.child("name"), &container["name"], names::dns1123_label);
    image(errors, &path.child("image"), &container["image"]);
    one_of(
        errors,
        &path.child("terminationMessagePolicy"),
        &container["terminationMessagePolicy"],
        &MESSAGE_POLICIES,
    );
    ports(errors, &path.child("ports"), &container["ports"]);
    environment::variables(errors, &path.child("env"), &container["env"]);
    environment::sources(errors, &path.child("envFrom"), &container["envFrom"]);
    volumes::mounts(errors, path, container, known);
    one_of(errors, &path.child("imagePullPolicy"), &container["imagePullPolicy"], &PULL_POLICIES);
    resources::validate(errors, &path.child("resources"), &container["resources"]);
    optional_one_of(errors, &path.child("restartPolicy"), &container["restartPolicy"], &RESTART_POLICIES);
    security::container(errors, &path.child("securityContext"), &container["securityContext"]);
}

/// An image's name must be there; whether it exists only the registry knows.
pub(super) fn image(errors: &mut Errors, path: &FieldPath, image: &Value) {
    if required(errors, path, image) && text(image).trim() != text(image) {
        errors.push(FieldError::invalid(path, image.clone(), "must not have leading or trailing whitespace"));
    }
}

fn lifecycle(errors: &mut Errors, path: &FieldPath, container: &Value) {
    for hook in ["postStart", "preStop"] {
        let handler = &container["lifecycle"][hook];
        if !handler.is_null() {
            probes::handler(errors, &path.child("lifecycle").child(hook), handler);
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let value = &container[probe];
        if value.is_null() {
            continue;
        }
        let path = path.child(probe);
        probes::validate(errors, &path, value);
        if probe != "readinessProbe" && number(&value["successThreshold"]) != 1 {
            let threshold = value["successThreshold"].clone();
            errors.push(FieldError::invalid(&path.child("successThreshold"), threshold, "must be 1"));
        }
        if probe == "readinessProbe" && !value["terminationGracePeriodSeconds"].is_null() {
            let grace = value["terminationGracePeriodSeconds"].clone();
            let detail = "must not be set for readinessProbes";
            errors.push(FieldError::invalid(&path.child("terminationGracePeriodSeconds"), grace, detail));
        }
    }
}

fn ports(errors: &mut Errors, path: &FieldPath, ports: &Value) {
    let mut seen = BTreeSet::new();
    for (index, port) in items(ports).iter().enumerate() {
        let path = path.index(index);
        let name = text(&port["name"]);
        if !name.is_empty() {
            let bad = names::port_name(name);
            if !bad.is_empty() {
                problems(errors, &path.child("name"), name, bad);
            } else if !seen.insert(name) {
                errors.push(FieldError::duplicate(&path.child("name"), name));
            }
        }
        if number(&port["containerPort"]) == 0 {
            errors.push(FieldError::required(&path.child("containerPort"), ""));
        } else {
            port_number(errors, &path.child("containerPort"), &port["containerPort"]);
        }
        if number(&port["hostPort"]) != 0 {
            port_number(errors, &path.child("hostPort"), &port["hostPort"]);
        }
        one_of(errors, &path.child("protocol"), &port["protocol"], &PROTOCOLS);
    }
}

/// Two containers of a pod can't have the same port of the host.
fn host_ports(errors: &mut Errors, path: &FieldPath, containers: &[Value]) {
    let mut seen = BTreeSet::new();
    for (index, container) in containers.iter().enumerate() {
        for (at, port) in items(&container["ports"]).iter().enumerate() {
            let host_port = number(&port["hostPort"]);
            if host_port == 0 {
                continue;
            }
            let key = format!("{}/{}/{host_port}", text(&port["protocol"]), text(&port["hostIP"]));
            if !seen.insert(key.clone()) {
                let path = path.index(index).child("ports").index(at).child("hostPort");
                errors.push(FieldError::duplicate(&path, key));
            }
        }
    }
}

fn host_network(errors: &mut Errors, path: &FieldPath, containers: &[Value]) {
    for (index, container) in containers.iter().enumerate() {
        for (at, port) in items(&container["ports"]).iter().enumerate() {
            let host_port = number(&port["hostPort"]);
            if host_port != 0 && host_port != number(&port["containerPort"]) {
                let path = path.index(index).child("ports").index(at).child("containerPort");
                let detail = "must match `hostPort` when `hostNetwork` is true";
                errors.push(FieldError::invalid(&path, port["containerPort"].clone(), detail));
            }
        }
    }
}
