//! Owns the class of Ingresses that say none: the cluster's default one, as upstream's DefaultIngressClass.

use super::Review;
use serde_json::{Value, json};
use std::cmp::Reverse;

const IS_DEFAULT: &str = "ingressclass.kubernetes.io/is-default-class";
/// How Ingresses said their class before there was a field.
const CLASS: &str = "kubernetes.io/ingress.class";

/// Names the default class: of several the newest, and of those the first by name.
pub(super) fn default_class(review: &Review<'_>, ingress: &mut Value) {
    if ingress["spec"]["ingressClassName"].is_string() || !ingress["metadata"]["annotations"][CLASS].is_null()
    {
        return;
    }
    let Some(classes) = review.api.resources.by_plural("networking.k8s.io", "ingressclasses") else { return };
    let classes = review.api.cache.snapshot(classes.id).objects;
    let defaults = classes.values().filter_map(|item| {
        let class = item.parse();
        let is_default = class["metadata"]["annotations"][IS_DEFAULT] == "true";
        let since = class["metadata"]["creationTimestamp"].as_str().unwrap_or_default().to_owned();
        is_default.then(|| (Reverse(since), item.name().to_owned()))
    });
    if let Some((_, name)) = defaults.min() {
        ingress["spec"]["ingressClassName"] = json!(name);
    }
}
