//! Validation of security contexts.

use serde_json::Value;

use super::super::checks::{Errors, in_range, one_of, optional_one_of, required};
use super::super::value::{is_empty, items, text};
use crate::field::{FieldError, FieldPath};

const MAX_ID: i64 = i32::MAX as i64;
const PROFILES: [&str; 3] = ["Localhost", "RuntimeDefault", "Unconfined"];

/// A pod's security context.
pub(super) fn pod(errors: &mut Errors, path: &FieldPath, spec: &Value) {
    let context = &spec["securityContext"];
    for field in ["fsGroup", "runAsUser", "runAsGroup"] {
        in_range(errors, &path.child(field), &context[field], 0, MAX_ID);
    }
    for (index, group) in items(&context["supplementalGroups"]).iter().enumerate() {
        in_range(errors, &path.child("supplementalGroups").index(index), group, 0, MAX_ID);
    }
    let policies = ["Always", "OnRootMismatch"];
    optional_one_of(errors, &path.child("fsGroupChangePolicy"), &context["fsGroupChangePolicy"], &policies);
    let policies = ["Merge", "Strict"];
    optional_one_of(
        errors,
        &path.child("supplementalGroupsPolicy"),
        &context["supplementalGroupsPolicy"],
        &policies,
    );
    profile(errors, &path.child("seccompProfile"), &context["seccompProfile"]);
    profile(errors, &path.child("appArmorProfile"), &context["appArmorProfile"]);
    if spec["shareProcessNamespace"] == true && spec["hostPID"] == true {
        let detail = "ShareProcessNamespace and HostPID cannot both be enabled";
        errors.push(FieldError::invalid(&path.child("shareProcessNamespace"), true, detail));
    }
    if spec["hostUsers"] == false {
        for field in ["hostNetwork", "hostPID", "hostIPC"] {
            if spec[field] == true {
                let detail = "when `hostUsers` is false";
                errors.push(FieldError::forbidden(&path.child(field), detail));
            }
        }
    }
    sysctls(errors, &path.child("sysctls"), &context["sysctls"]);
}

fn sysctls(errors: &mut Errors, path: &FieldPath, sysctls: &Value) {
    let mut seen = std::collections::BTreeSet::new();
    for (index, sysctl) in items(sysctls).iter().enumerate() {
        let path = path.index(index).child("name");
        let name = text(&sysctl["name"]);
        if !required(errors, &path, &sysctl["name"]) {
            continue;
        }
        let part = |part: &str| {
            let edge = |byte: Option<&u8>| {
                byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
            };
            let inner =
                |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_');
            let bytes = part.as_bytes();
            edge(bytes.first()) && edge(bytes.last()) && bytes.iter().copied().all(inner)
        };
        if name.len() > 253 || !name.split(['.', '/']).all(part) {
            let detail = "must have at most 253 characters and match regex ^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$";
            errors.push(FieldError::invalid(&path, name, detail));
        } else if !seen.insert(name) {
            errors.push(FieldError::duplicate(&path, name));
        }
    }
}

fn profile(errors: &mut Errors, path: &FieldPath, profile: &Value) {
    if profile.is_null() {
        return;
    }
    one_of(errors, &path.child("type"), &profile["type"], &PROFILES);
    let local = profile["type"] == "Localhost";
    let name = &profile["localhostProfile"];
    if local && is_empty(name) {
        let detail = "must be set when seccomp type is Localhost";
        errors.push(FieldError::required(&path.child("localhostProfile"), detail));
    } else if !local && !name.is_null() {
        let detail = "can only be set when seccomp type is Localhost";
        errors.push(FieldError::invalid(&path.child("localhostProfile"), name.clone(), detail));
    }
}

/// A container's security context.
pub(super) fn container(errors: &mut Errors, path: &FieldPath, context: &Value) {
    if context.is_null() {
        return;
    }
    for field in ["runAsUser", "runAsGroup"] {
        in_range(errors, &path.child(field), &context[field], 0, MAX_ID);
    }
    optional_one_of(errors, &path.child("procMount"), &context["procMount"], &["Default", "Unmasked"]);
    profile(errors, &path.child("seccompProfile"), &context["seccompProfile"]);
    profile(errors, &path.child("appArmorProfile"), &context["appArmorProfile"]);
    if context["allowPrivilegeEscalation"] == false {
        if context["privileged"] == true {
            let detail = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true";
            errors.push(FieldError::invalid(path, context.clone(), detail));
        }
        let admin = |one: &Value| matches!(text(one), "CAP_SYS_ADMIN" | "SYS_ADMIN");
        if items(&context["capabilities"]["add"]).iter().any(admin) {
            let detail =
                "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN";
            errors.push(FieldError::invalid(path, context.clone(), detail));
        }
    }
}
