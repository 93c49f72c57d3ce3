//! The programs that the binary carries: `weft-init`, `weft-cni` and the eBPF object.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A compressed program.
#[derive(Clone, Copy)]
struct Packed {
    bytes: &'static [u8],
    unpacked_bytes: usize,
}

include!(concat!(env!("OUT_DIR"), "/embedded.rs"));

/// Where the node's programs lie once they are unpacked.
#[derive(Clone, Debug)]
pub(crate) struct Programs {
    pub(crate) init: PathBuf,
    /// Folder with the CNI plugins.
    pub(crate) cni_bin: PathBuf,
    pub(crate) ebpf: &'static [u8],
}

/// Why the node's programs can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("this build of weft carries no {0}; build it with `cargo xtask build`")]
    Missing(&'static str),
    #[error("the {0} that this build of weft carries can't be unpacked")]
    Damaged(&'static str, #[source] std::io::Error),
    #[error("cannot write {path:?}")]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// Names as errors give them.
const EBPF_NAME: &str = "eBPF programs";

impl Packed {
    fn unpack(self, name: &'static str) -> Result<Vec<u8>, Error> {
        zstd::bulk::decompress(self.bytes, self.unpacked_bytes).map_err(|source| Error::Damaged(name, source))
    }
}

/// Whether the binary carries all of them.
pub(crate) fn check() -> Result<(), Error> {
    EBPF.ok_or(Error::Missing(EBPF_NAME))?;
    WEFT_INIT.ok_or(Error::Missing("weft-init"))?;
    WEFT_CNI.ok_or(Error::Missing("weft-cni"))?;
    Ok(())
}

/// Writes the programs below `bin` unless they are there already. A running program is replaced by rename, never written over.
pub(crate) fn unpack(bin: &Path) -> Result<Programs, Error> {
    let init = place(bin, "weft-init", WEFT_INIT)?;
    place(bin, "weft-cni", WEFT_CNI)?;
    Ok(Programs { init, cni_bin: bin.to_path_buf(), ebpf: ebpf()? })
}

/// The eBPF object, unpacked once for the life of the process: an agent's data plane may start more than once.
pub(crate) fn ebpf() -> Result<&'static [u8], Error> {
    static OBJECT: OnceLock<Vec<u8>> = OnceLock::new();
    let packed = EBPF.ok_or(Error::Missing(EBPF_NAME))?;
    let object = match OBJECT.get() {
        Some(object) => object,
        None => {
            let object = packed.unpack(EBPF_NAME)?;
            OBJECT.get_or_init(|| object)
        }
    };
    Ok(object)
}

fn place(bin: &Path, name: &'static str, packed: Option<Packed>) -> Result<PathBuf, Error> {
    let content = packed.ok_or(Error::Missing(name))?.unpack(name)?;
    let path = bin.join(name);
    if fs::read(&path).is_ok_and(|present| present == content) {
        return Ok(path);
    }
    let failed = |source| Error::Write { path: path.clone(), source };
    fs::create_dir_all(bin).map_err(failed)?;
    let fresh = bin.join(format!(".{name}.new"));
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o755)
        .open(&fresh)
        .map_err(failed)?;
    file.write_all(&content).map_err(failed)?;
    drop(file);
    fs::rename(&fresh, &path).map_err(failed)?;
    Ok(path)
}
