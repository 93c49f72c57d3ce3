//! What a schema says about objects: definitions, fields, types, list and map semantics, merge keys.
use std::{borrow::Cow, sync::LazyLock};

use crate::facts;

/// A name in a schema: borrowed from the embedded table for built-in kinds.
pub type Name = Cow<'static, str>;

/// Index of a definition in its [`Schema`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DefinitionId(pub(crate) u16);

/// Definitions that refer to each other.
#[derive(Debug)]
pub struct Schema {
    /// Sorted by name.
    pub(crate) definitions: Box<[Definition]>,
}

/// A named type.
#[derive(Debug)]
pub struct Definition {
    /// For instance `io.k8s.api.core.v1.Pod`.
    pub name: Name,
    /// How values look.
    pub shape: Shape,
    /// `x-kubernetes-map-type: atomic`.
    pub atomic: bool,
    /// Which group, version and kind the definition is; `*` for group and version when it belongs to all.
    pub gvk: Option<(Name, Name, Name)>,
    /// Sorted by name; only [`Shape::Object`] has any.
    pub fields: Box<[Field]>,
}

/// How values of a definition look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// An object with known fields.
    Object,
    /// An RFC 3339 time in seconds, written in UTC.
    Time,
    /// An RFC 3339 time in microseconds, written in UTC.
    MicroTime,
    /// A quantity, string or number, written in its canonical form.
    Quantity,
    /// An int32 or a string.
    IntOrString,
    /// Any object, kept as it is.
    Raw,
    /// Any value, kept as it is.
    Json,
    /// A JSON schema, or a list of such or of strings, or a boolean.
    JsonSchema,
}

/// A field of a definition.
#[derive(Debug)]
pub struct Field {
    /// JSON name.
    pub name: Name,
    /// Type of its values.
    pub ty: Type,
    /// The schema lists it as required.
    pub required: bool,
    /// `x-kubernetes-list-type`.
    pub list_type: ListType,
    /// `x-kubernetes-list-map-keys`.
    pub list_keys: Box<[Name]>,
    /// `x-kubernetes-patch-merge-key`.
    pub merge_key: Option<Name>,
    /// Patch strategy `merge`.
    pub patch_merge: bool,
    /// Patch strategy `retainKeys`.
    pub retain_keys: bool,
    /// `x-kubernetes-map-type: atomic`.
    pub atomic_map: bool,
}

/// `x-kubernetes-list-type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListType {
    /// Not said, which means atomic.
    None,
    /// Replaced as a whole.
    Atomic,
    /// Scalars without duplicates.
    Set,
    /// Objects identified by the list's keys.
    Map,
}

/// Type of a field's values, of a list's items or of a map's values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Type {
    /// A string.
    String,
    /// A 32-bit integer.
    Int32,
    /// A 64-bit integer.
    Int64,
    /// A floating-point number.
    Double,
    /// A boolean.
    Bool,
    /// Bytes, as base64 in a string.
    Bytes,
    /// Any object.
    Object,
    /// A definition.
    Ref(DefinitionId),
    /// A list.
    List(Box<Type>),
    /// A map from strings.
    Map(Box<Type>),
}

impl Schema {
    /// The definitions of the built-in kinds.
    pub fn builtin() -> &'static Schema {
        static BUILTIN: LazyLock<Schema> = LazyLock::new(facts::schema);
        &BUILTIN
    }

    /// The definition behind an id of this schema.
    pub fn get(&self, id: DefinitionId) -> &Definition {
        &self.definitions[usize::from(id.0)]
    }

    /// Looks a definition up by its full name.
    pub fn by_name(&self, name: &str) -> Option<DefinitionId> {
        let at = self.definitions.binary_search_by(|definition| definition.name.as_ref().cmp(name)).ok()?;
        u16::try_from(at).ok().map(DefinitionId)
    }

    /// Looks a definition up by group, version and kind.
    pub fn by_gvk(&self, group: &str, version: &str, kind: &str) -> Option<DefinitionId> {
        let at = self.definitions.iter().position(|definition| {
            definition
                .gvk
                .as_ref()
                .is_some_and(|(g, v, k)| k == kind && (g == "*" || g == group) && (v == "*" || v == version))
        })?;
        u16::try_from(at).ok().map(DefinitionId)
    }

    /// Every definition with its id.
    pub fn iter(&self) -> impl Iterator<Item = (DefinitionId, &Definition)> {
        (0..).map(DefinitionId).zip(&self.definitions)
    }
}

impl Definition {
    /// The field of this JSON name.
    pub fn field(&self, name: &str) -> Option<&Field> {
        let at = self.fields.binary_search_by(|field| field.name.as_ref().cmp(name)).ok()?;
        self.fields.get(at)
    }

    /// The name as Go prints the type, such as `v1.PodSpec`.
    pub(crate) fn go_type(&self) -> String {
        let mut parts = self.name.rsplit('.');
        let (kind, package) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        format!("{package}.{kind}")
    }

    /// The name without its package, such as `PodSpec`.
    pub(crate) fn go_name(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or_default()
    }
}
