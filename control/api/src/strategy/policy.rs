//! Authorization, admission, certificates, flow control, extensions: defaults and validation.

mod validation;

use serde_json::{Value, json};

use super::value::{at, default_object, default_to, default_zero, each, is_empty, text};

pub(super) use validation::{create, update};

/// The API group of roles and their bindings.
const RBAC: &str = "rbac.authorization.k8s.io";
const HTTPS: i64 = 443;

/// Applies the defaults of `kind`; does nothing for a kind of another family.
pub(super) fn default(group: &str, kind: &str, object: &mut Value) {
    match (group, kind) {
        (RBAC, "RoleBinding" | "ClusterRoleBinding") => role_binding(object),
        (
            "admissionregistration.k8s.io",
            "ValidatingWebhookConfiguration" | "MutatingWebhookConfiguration",
        ) => {
            let mutating = kind == "MutatingWebhookConfiguration";
            each(object, "webhooks").for_each(|one| webhook(one, mutating));
        }
        ("admissionregistration.k8s.io", "ValidatingAdmissionPolicy" | "MutatingAdmissionPolicy") => {
            if let Some(spec) = at(object, &["spec"]) {
                default_to(spec, "failurePolicy", "Fail");
                match_resources(at(spec, &["matchConstraints"]));
            }
        }
        (
            "admissionregistration.k8s.io",
            "ValidatingAdmissionPolicyBinding" | "MutatingAdmissionPolicyBinding",
        ) => {
            match_resources(at(object, &["spec", "matchResources"]));
        }
        ("apiextensions.k8s.io", "CustomResourceDefinition") => definition(object),
        ("apiregistration.k8s.io", "APIService") => {
            if let Some(service) = at(object, &["spec", "service"]) {
                default_to(service, "port", HTTPS);
            }
            default_object(object, "status");
        }
        ("certificates.k8s.io", "CertificateSigningRequest") => {
            default_object(object, "status");
        }
        ("flowcontrol.apiserver.k8s.io", "FlowSchema") => {
            if let Some(spec) = at(object, &["spec"]) {
                default_zero(spec, "matchingPrecedence", 1000);
            }
            default_object(object, "status");
        }
        ("flowcontrol.apiserver.k8s.io", "PriorityLevelConfiguration") => priority_level(object),
        _ => {}
    }
}

fn role_binding(object: &mut Value) {
    if let Some(role) = at(object, &["roleRef"]) {
        default_zero(role, "apiGroup", RBAC);
    }
    for subject in each(object, "subjects") {
        if matches!(text(&subject["kind"]), "User" | "Group") {
            default_zero(subject, "apiGroup", RBAC);
        }
    }
}

fn webhook(webhook: &mut Value, mutating: bool) {
    default_to(webhook, "failurePolicy", "Fail");
    default_to(webhook, "matchPolicy", "Equivalent");
    default_to(webhook, "timeoutSeconds", 10);
    if mutating {
        default_to(webhook, "reinvocationPolicy", "Never");
    }
    default_object(webhook, "namespaceSelector");
    default_object(webhook, "objectSelector");
    each(webhook, "rules").for_each(|rule| default_to(rule, "scope", "*"));
    if let Some(service) = at(webhook, &["clientConfig", "service"]) {
        default_to(service, "port", HTTPS);
    }
}

fn match_resources(resources: Option<&mut Value>) {
    let Some(resources) = resources else { return };
    default_to(resources, "matchPolicy", "Equivalent");
    default_object(resources, "namespaceSelector");
    default_object(resources, "objectSelector");
    for list in ["resourceRules", "excludeResourceRules"] {
        each(resources, list).for_each(|rule| default_to(rule, "scope", "*"));
    }
}

fn definition(object: &mut Value) {
    let Some(spec) = at(object, &["spec"]) else { return };
    if let Some(names) = at(spec, &["names"]) {
        let kind = text(&names["kind"]).to_owned();
        if !kind.is_empty() {
            default_zero(names, "singular", kind.to_lowercase());
            default_zero(names, "listKind", format!("{kind}List"));
        }
    }
    if let Some(conversion) = default_object(spec, "conversion") {
        default_zero(conversion, "strategy", "None");
        if let Some(service) = at(conversion, &["webhook", "clientConfig", "service"]) {
            default_to(service, "port", HTTPS);
        }
    }
}

fn priority_level(object: &mut Value) {
    let Some(spec) = at(object, &["spec"]) else { return };
    if let Some(limited) = at(spec, &["limited"]) {
        default_to(limited, "nominalConcurrencyShares", 30);
        default_to(limited, "lendablePercent", 0);
        if let Some(queuing) = at(limited, &["limitResponse", "queuing"]) {
            for (field, value) in [("queues", 64), ("handSize", 8), ("queueLengthLimit", 50)] {
                default_zero(queuing, field, value);
            }
        }
    }
    if let Some(exempt) = at(spec, &["exempt"]) {
        default_to(exempt, "nominalConcurrencyShares", 0);
        default_to(exempt, "lendablePercent", 0);
    }
    if is_empty(&object["status"]) {
        object["status"] = json!({});
    }
}
