//! What an image comes in: an OCI layout (folder or tar) or the archive of `docker save`, with its layers found.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest as _, Sha256};

use super::reference::digest_hex;
use super::{Config, ImageError};

/// Manifests and configurations are small; more is an attack or a mistake.
const MAX_DOCUMENT_BYTES: u64 = 8 << 20;
/// Nesting of indexes, and links to layers in old archives.
const MAX_DEPTH: usize = 4;
const NAME: &str = "org.opencontainers.image.ref.name";
const FULL_NAME: &str = "io.containerd.image.name";

/// An image found in an archive.
pub(super) struct Found {
    pub(super) names: Vec<String>,
    pub(super) manifest: Option<String>,
    /// Digest of the configuration.
    pub(super) id: String,
    pub(super) config: Config,
    /// Files of the layers, in the order of the configuration's diff ids.
    pub(super) layers: Vec<Blob>,
}

/// A layer as it lies in the archive.
pub(super) struct Blob {
    path: String,
    /// To verify; an archive of `docker save` has none, but every layer has its diff id.
    pub(super) digest: Option<String>,
}

/// A source of files by name.
pub(super) enum Archive {
    Folder(PathBuf),
    Tar { file: File, files: HashMap<String, Place> },
}

pub(super) enum Place {
    At { offset: u64, length: u64 },
    Link(String),
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Clone, Deserialize)]
struct Descriptor {
    digest: String,
    #[serde(default)]
    annotations: HashMap<String, String>,
    platform: Option<Platform>,
}

#[derive(Clone, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct Manifest {
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
    /// Set if this is an index in fact.
    manifests: Option<Vec<Descriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Archive {
    pub(super) fn open(path: &Path, scratch: &Path) -> Result<Self, ImageError> {
        let fail = |source| ImageError::Io { op: "read", path: path.to_path_buf(), source };
        if fs::metadata(path).map_err(fail)?.is_dir() {
            return Ok(Self::Folder(path.to_path_buf()));
        }
        let mut file = File::open(path).map_err(fail)?;
        if compression(&mut file).map_err(fail)? != Compression::None {
            file = inflate(file, scratch).map_err(fail)?;
        }
        let files = places(&mut file).map_err(fail)?;
        Ok(Self::Tar { file, files })
    }

    pub(super) fn images(&self) -> Result<Vec<Found>, ImageError> {
        if self.has("manifest.json") {
            let saved: Vec<Saved> = self.document("manifest.json", None)?;
            return saved.into_iter().map(|saved| self.saved(saved)).collect();
        }
        if !self.has("index.json") {
            return Err(ImageError::Format("neither index.json nor manifest.json is in it".to_owned()));
        }
        let index: Index = self.document("index.json", None)?;
        index
            .manifests
            .into_iter()
            .map(|descriptor| self.oci(&descriptor, 0))
            .filter_map(Result::transpose)
            .collect()
    }

    fn saved(&self, saved: Saved) -> Result<Found, ImageError> {
        let text = self.text(&saved.config)?;
        let id = format!("sha256:{}", hex(&Sha256::digest(&text)));
        let config = parse(&text, &saved.config)?;
        let blob = |path: String| {
            let digest = path.strip_prefix("blobs/sha256/").map(|hex| format!("sha256:{hex}"));
            Blob { path, digest }
        };
        let names = saved.repo_tags.unwrap_or_default();
        Ok(Found { names, manifest: None, id, config, layers: saved.layers.into_iter().map(blob).collect() })
    }

    /// `None` for what is no image for this machine: other platforms, signatures.
    fn oci(&self, descriptor: &Descriptor, depth: usize) -> Result<Option<Found>, ImageError> {
        let foreign = |platform: &Platform| platform.os != "linux" || platform.architecture != architecture();
        if descriptor.platform.as_ref().is_some_and(foreign) {
            return Ok(None);
        }
        let manifest: Manifest = self.document(&blob_path(&descriptor.digest)?, Some(&descriptor.digest))?;
        if let Some(inner) = manifest.manifests {
            if depth >= MAX_DEPTH {
                return Err(ImageError::Format("its indexes are nested too deep".to_owned()));
            }
            let found = inner
                .iter()
                .map(|inner| self.oci(inner, depth + 1))
                .find_map(Result::transpose)
                .transpose()?;
            return Ok(found.map(|found| found.named(descriptor)));
        }
        let Some(config) = manifest.config else { return Ok(None) };
        let path = blob_path(&config.digest)?;
        let text = self.text(&path)?;
        verify(&config.digest, &hex(&Sha256::digest(&text)))?;
        let layer = |layer: &Descriptor| {
            Ok(Blob { path: blob_path(&layer.digest)?, digest: Some(layer.digest.clone()) })
        };
        let layers = manifest.layers.iter().map(layer).collect::<Result<_, ImageError>>()?;
        let config_value = parse(&text, &path)?;
        let found =
            Found { names: Vec::new(), manifest: None, id: config.digest, config: config_value, layers };
        Ok(Some(found.named(descriptor)))
    }

    fn has(&self, path: &str) -> bool {
        match self {
            Self::Folder(folder) => folder.join(path).is_file(),
            Self::Tar { files, .. } => files.contains_key(path),
        }
    }

    /// A layer, uncompressed. The reader of the raw bytes hashes what passes.
    pub(super) fn layer(&self, blob: &Blob) -> Result<Inflated, ImageError> {
        let fail = |source| ImageError::Io { op: "read", path: PathBuf::from(&blob.path), source };
        Inflated::new(self.reader(&blob.path, 0)?).map_err(fail)
    }

    fn reader(&self, path: &str, depth: usize) -> Result<Box<dyn Read + Send>, ImageError> {
        let missing = || ImageError::Format(format!("{path:?} is not in it"));
        let fail = |source| ImageError::Io { op: "read", path: PathBuf::from(path), source };
        match self {
            Self::Folder(folder) => {
                let relative = Path::new(path);
                if !relative.components().all(|part| matches!(part, Component::Normal(_))) {
                    return Err(missing());
                }
                Ok(Box::new(File::open(folder.join(relative)).map_err(fail)?))
            }
            Self::Tar { file, files } => match files.get(path).ok_or_else(missing)? {
                Place::At { offset, length } => {
                    let part = Part { file: file.try_clone().map_err(fail)?, offset: *offset, left: *length };
                    Ok(Box::new(part))
                }
                Place::Link(target) if depth < MAX_DEPTH => self.reader(target, depth + 1),
                Place::Link(_) => Err(missing()),
            },
        }
    }

    fn text(&self, path: &str) -> Result<Vec<u8>, ImageError> {
        let mut text = Vec::new();
        let read = self.reader(path, 0)?.take(MAX_DOCUMENT_BYTES + 1).read_to_end(&mut text);
        read.map_err(|source| ImageError::Io { op: "read", path: PathBuf::from(path), source })?;
        if text.len() as u64 > MAX_DOCUMENT_BYTES {
            return Err(ImageError::Format(format!("{path:?} is too large")));
        }
        Ok(text)
    }

    fn document<T: DeserializeOwned>(&self, path: &str, digest: Option<&str>) -> Result<T, ImageError> {
        let text = self.text(path)?;
        digest.map_or(Ok(()), |digest| verify(digest, &hex(&Sha256::digest(&text))))?;
        parse(&text, path)
    }
}

impl Found {
    fn named(mut self, descriptor: &Descriptor) -> Self {
        let name = descriptor.annotations.get(FULL_NAME).or_else(|| descriptor.annotations.get(NAME));
        if let Some(name) = name {
            self.names = vec![name.clone()];
        }
        self.manifest = Some(descriptor.digest.clone());
        self
    }
}

fn parse<T: DeserializeOwned>(text: &[u8], path: &str) -> Result<T, ImageError> {
    serde_json::from_slice(text).map_err(|error| ImageError::Format(format!("{path:?}: {error}")))
}

fn blob_path(digest: &str) -> Result<String, ImageError> {
    let hex =
        digest_hex(digest).ok_or_else(|| ImageError::Format(format!("{digest:?} is no sha256 digest")))?;
    Ok(format!("blobs/sha256/{hex}"))
}

/// Compares a digest with the hexadecimal digits of what was read.
pub(super) fn verify(digest: &str, found: &str) -> Result<(), ImageError> {
    if digest_hex(digest) == Some(found) {
        return Ok(());
    }
    Err(ImageError::Digest { expected: digest.to_owned(), found: format!("sha256:{found}") })
}

/// This machine's architecture in Go's words.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a string can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[derive(PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

fn compression_of(head: &[u8]) -> Compression {
    match head {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
        _ => Compression::None,
    }
}

fn compression(file: &mut File) -> io::Result<Compression> {
    let mut head = Vec::new();
    file.by_ref().take(4).read_to_end(&mut head)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(compression_of(&head))
}

/// A compressed archive has no places to seek to: it is unpacked to a file without a name.
fn inflate(file: File, scratch: &Path) -> io::Result<File> {
    let path = scratch.join(format!("archive-{}", uuid::Uuid::new_v4()));
    let mut plain = File::options().read(true).write(true).create_new(true).open(&path)?;
    fs::remove_file(&path)?;
    io::copy(&mut Inflated::new(Box::new(file))?, &mut plain)?;
    plain.seek(SeekFrom::Start(0))?;
    Ok(plain)
}

fn places(file: &mut File) -> io::Result<HashMap<String, Place>> {
    let mut files = HashMap::new();
    let mut archive = tar::Archive::new(BufReader::new(file));
    for entry in archive.entries()? {
        let entry = entry?;
        let name = entry.path()?.to_string_lossy().trim_start_matches("./").trim_end_matches('/').to_owned();
        let kind = entry.header().entry_type();
        if kind.is_file() {
            files.insert(name, Place::At { offset: entry.raw_file_position(), length: entry.size() });
        } else if let (true, Some(target)) = (kind.is_symlink() || kind.is_hard_link(), entry.link_name()?) {
            let base = if kind.is_symlink() { Path::new(&name).parent() } else { None };
            files.insert(name.clone(), Place::Link(normal(&base.unwrap_or(Path::new("")).join(target))));
        }
    }
    Ok(files)
}

fn normal(path: &Path) -> String {
    let mut parts: Vec<String> = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => parts.push(part.to_string_lossy().into_owned()),
            Component::ParentDir => drop(parts.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    parts.join("/")
}

/// A part of a file, read without a shared position.
struct Part {
    file: File,
    offset: u64,
    left: u64,
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        use std::os::unix::fs::FileExt;
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read_at(&mut buffer[..most], self.offset)?;
        self.offset += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}

/// Hashes what passes.
pub(super) struct Hashing<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Hashing<R> {
    pub(super) fn new(inner: R) -> Self {
        Self { inner, hash: Sha256::new() }
    }

    /// Reads the rest and says the hash of all.
    pub(super) fn finish(mut self) -> io::Result<(R, String)> {
        io::copy(&mut self, &mut io::sink())?;
        Ok((self.inner, hex(&self.hash.finalize())))
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hash.update(&buffer[..read]);
        Ok(read)
    }
}

type Raw = BufReader<Hashing<Box<dyn Read + Send>>>;

/// A stream whatever its compression.
pub(super) enum Inflated {
    Plain(Raw),
    Gzip(Box<flate2::bufread::MultiGzDecoder<Raw>>),
    Zstd(zstd::Decoder<'static, Raw>),
}

impl Inflated {
    fn new(raw: Box<dyn Read + Send>) -> io::Result<Self> {
        use io::BufRead;
        let mut raw = BufReader::with_capacity(64 << 10, Hashing::new(raw));
        let kind = compression_of(raw.fill_buf()?);
        Ok(match kind {
            Compression::None => Self::Plain(raw),
            Compression::Gzip => Self::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(raw))),
            Compression::Zstd => Self::Zstd(zstd::Decoder::with_buffer(raw)?),
        })
    }

    /// The hash of the raw bytes.
    pub(super) fn finish(self) -> io::Result<String> {
        let raw = match self {
            Self::Plain(raw) => raw,
            Self::Gzip(gzip) => gzip.into_inner(),
            Self::Zstd(zstd) => zstd.finish(),
        };
        raw.into_inner().finish().map(|(_, hash)| hash)
    }
}

impl Read for Inflated {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(raw) => raw.read(buffer),
            Self::Gzip(gzip) => gzip.read(buffer),
            Self::Zstd(zstd) => zstd.read(buffer),
        }
    }
}
