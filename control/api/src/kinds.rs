//! The built-in kinds: names, scope, verbs and subresources, as upstream's discovery documents say.
use std::sync::LazyLock;

use crate::{
    facts,
    schema::{Definition, DefinitionId, Schema},
    status::{GroupKind, GroupResource},
};

/// A kind in one version of its group.
#[derive(Debug)]
pub struct Kind {
    /// API group; empty for the core group.
    pub group: &'static str,
    /// Version within the group.
    pub version: &'static str,
    /// Name of the type, such as `Pod`.
    pub kind: &'static str,
    /// Name in paths, such as `pods`.
    pub plural: &'static str,
    /// Lower-case singular name.
    pub singular: &'static str,
    /// Abbreviations.
    pub short_names: Box<[&'static str]>,
    /// Categories, such as `all`.
    pub categories: Box<[&'static str]>,
    /// Whether objects live in a namespace.
    pub namespaced: bool,
    /// What can be done with it, sorted.
    pub verbs: Box<[&'static str]>,
    /// Subresources, sorted by name.
    pub subresources: Vec<Subresource>,
    /// Whether objects are stored in this version. Other versions of the kind are converted to the one that is;
    /// `events.k8s.io` Events are stored as core Events.
    pub storage_version: bool,
    /// Hash of the storage version as upstream publishes it; empty for a kind that isn't stored.
    pub storage_version_hash: &'static str,
    /// The kind's definition in [`Schema::builtin`]; every kind has one that has a body.
    pub definition: Option<DefinitionId>,
}

/// A subresource of a kind.
#[derive(Debug)]
pub struct Subresource {
    /// Last part of its path.
    pub name: &'static str,
    /// Group of its body's kind.
    pub group: &'static str,
    /// Version of its body's kind.
    pub version: &'static str,
    /// Its body's kind.
    pub kind: &'static str,
    /// Discovery names group and version since they aren't the parent's.
    pub foreign: bool,
    /// What can be done with it, sorted.
    pub verbs: Box<[&'static str]>,
}

/// Group, version and kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gvk<'a> {
    /// API group; empty for the core group.
    pub group: &'a str,
    /// Version within the group.
    pub version: &'a str,
    /// Name of the type.
    pub kind: &'a str,
}

/// Every built-in kind in every version, in upstream's discovery order: groups by priority, preferred version first.
pub fn all() -> &'static [Kind] {
    static KINDS: LazyLock<Box<[Kind]>> = LazyLock::new(facts::kinds);
    &KINDS
}

/// The kinds that are served without being asked for: those in a stable version.
pub fn served() -> impl Iterator<Item = &'static Kind> + Clone {
    all().iter().filter(|kind| kind.is_stable())
}

/// Finds a kind by the words of its path.
pub fn find(group: &str, version: &str, plural: &str) -> Option<&'static Kind> {
    all().iter().find(|kind| kind.plural == plural && kind.group == group && kind.version == version)
}

/// Finds a kind by its type.
pub fn by_gvk(group: &str, version: &str, kind: &str) -> Option<&'static Kind> {
    all().iter().find(|known| known.kind == kind && known.group == group && known.version == version)
}

impl Kind {
    /// `apiVersion` of objects of this kind.
    pub fn api_version(&self) -> String {
        self.gvk().api_version()
    }

    /// Group, version and kind.
    pub fn gvk(&self) -> Gvk<'static> {
        Gvk { group: self.group, version: self.version, kind: self.kind }
    }

    /// Name in messages about the path, such as `deployments.apps`.
    pub fn group_resource(&self) -> GroupResource<'static> {
        GroupResource { group: self.group, resource: self.plural }
    }

    /// Name in messages about the type, such as `Deployment.apps`.
    pub fn group_kind(&self) -> GroupKind<'static> {
        GroupKind { group: self.group, kind: self.kind }
    }

    /// Whether the version is stable, which means served by default.
    pub fn is_stable(&self) -> bool {
        self.version.strip_prefix('v').is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    }

    /// Whether discovery lists the verb.
    pub fn has_verb(&self, verb: &str) -> bool {
        self.verbs.contains(&verb)
    }

    /// The subresource of this name.
    pub fn subresource(&self, name: &str) -> Option<&Subresource> {
        self.subresources.iter().find(|subresource| subresource.name == name)
    }

    /// The definition of the kind's objects.
    pub fn schema(&self) -> Option<&'static Definition> {
        self.definition.map(|id| Schema::builtin().get(id))
    }
}

impl Subresource {
    /// Group, version and kind of its body.
    pub fn gvk(&self) -> Gvk<'static> {
        Gvk { group: self.group, version: self.version, kind: self.kind }
    }
}

/// What has a type: a kind, a subresource, or a bare group, version and kind.
pub trait Typed {
    /// Group, version and kind.
    fn type_name(&self) -> Gvk<'_>;

    /// The definition of its objects.
    fn definition(&self) -> Option<DefinitionId> {
        let gvk = self.type_name();
        Schema::builtin().by_gvk(gvk.group, gvk.version, gvk.kind)
    }
}

impl Typed for Kind {
    fn type_name(&self) -> Gvk<'_> {
        self.gvk()
    }

    fn definition(&self) -> Option<DefinitionId> {
        self.definition
    }
}

impl Typed for Subresource {
    fn type_name(&self) -> Gvk<'_> {
        self.gvk()
    }
}

impl Typed for Gvk<'_> {
    fn type_name(&self) -> Gvk<'_> {
        *self
    }
}

impl<'a> Gvk<'a> {
    /// Splits `apiVersion`, which is `v1` or `apps/v1`.
    pub fn parse(api_version: &'a str, kind: &'a str) -> Self {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        Self { group, version, kind }
    }

    /// `v1` or `apps/v1`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{ListType, Shape, Type};

    #[test]
    fn facts_are_read() {
        let deployment = find("apps", "v1", "deployments").unwrap();
        assert_eq!(deployment.kind, "Deployment");
        assert_eq!(&*deployment.short_names, ["deploy"]);
        assert!(deployment.namespaced && deployment.storage_version && deployment.is_stable());
        assert_eq!(deployment.subresource("scale").unwrap().gvk().api_version(), "autoscaling/v1");
        assert_eq!(deployment.schema().unwrap().shape, Shape::Object);
        assert!(by_gvk("", "v1", "Node").is_some_and(|node| !node.namespaced));
        assert!(by_gvk("autoscaling", "v2", "HorizontalPodAutoscaler").unwrap().storage_version);
        assert!(!by_gvk("autoscaling", "v1", "HorizontalPodAutoscaler").unwrap().storage_version);
        assert!(find("apps", "v1", "widgets").is_none());
    }

    #[test]
    fn every_kind_has_its_definition() {
        for kind in all() {
            assert!(kind.definition.is_some(), "{}/{} {}", kind.group, kind.version, kind.kind);
        }
        assert!(served().count() > 60 && served().all(|kind| !kind.version.contains("beta")));
    }

    #[test]
    fn fields_carry_merge_and_list_facts() {
        let schema = Schema::builtin();
        let spec = schema.get(schema.by_name("io.k8s.api.core.v1.PodSpec").unwrap());
        let containers = spec.field("containers").unwrap();
        assert!(containers.required && containers.patch_merge && !containers.retain_keys);
        assert_eq!(containers.merge_key.as_deref(), Some("name"));
        assert_eq!((containers.list_type, &*containers.list_keys), (ListType::Map, &["name".into()][..]));
        assert!(matches!(&containers.ty, Type::List(item) if matches!(**item, Type::Ref(_))));
        assert!(spec.field("volumes").unwrap().retain_keys);
        assert!(spec.field("nodeSelector").unwrap().atomic_map);
        let options = schema.by_gvk("apps", "v1", "DeleteOptions").unwrap();
        assert_eq!(schema.get(options).go_type(), "v1.DeleteOptions");
    }
}
