//! An object without what only a debugger reads. The compiler has to make it: BTF, which the kernel is given with the programs, follows
//! from it. It is most of the object, and would be in every copy of the program that carries it.

use anyhow::{Context as _, ensure};
use object::{Object as _, ObjectSection as _};

/// What the sections begin with, and those of their relocations.
const DEBUG: [&str; 2] = [".debug_", ".rel.debug_"];

/// Bytes of the headers (ELF-64, `Elf64_Ehdr` and `Elf64_Shdr`), and where fields are.
const FILE_HEADER: usize = 64;
const SECTION_HEADER: usize = 64;
const SECTIONS_AT: usize = 0x28;
const SECTION_OFFSET: usize = 24;
/// What sections are aligned to.
const ALIGNMENT: usize = 8;

/// The object without them. The other sections keep their numbers, by which symbols and relocations go: of those left out an empty header
/// stays.
///
/// # Errors
/// If the object can't be read.
pub(super) fn without_debug(object: &[u8]) -> anyhow::Result<Vec<u8>> {
    let file = object::File::parse(object).context("the eBPF object can't be read")?;
    let header = object.get(..FILE_HEADER).context("the eBPF object is cut off")?;
    let table = usize::try_from(u64::from_le_bytes(header[SECTIONS_AT..SECTIONS_AT + 8].try_into()?))?;
    let mut out = header.to_vec();
    let mut headers = vec![[0_u8; SECTION_HEADER]];
    for section in file.sections() {
        let index = section.index().0;
        ensure!(index == headers.len(), "section {index} of the eBPF object is not where it is expected");
        let at = table + index * SECTION_HEADER;
        let mut header: [u8; SECTION_HEADER] =
            object.get(at..at + SECTION_HEADER).context("a section has no header")?.try_into()?;
        if DEBUG.iter().any(|name| section.name().is_ok_and(|own| own.starts_with(name))) {
            header = [0; SECTION_HEADER];
        } else {
            out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
            header[SECTION_OFFSET..SECTION_OFFSET + 8]
                .copy_from_slice(&u64::try_from(out.len())?.to_le_bytes());
            out.extend(section.data().context("a section can't be read")?);
        }
        headers.push(header);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    let table = u64::try_from(out.len())?.to_le_bytes();
    out[SECTIONS_AT..SECTIONS_AT + 8].copy_from_slice(&table);
    out.extend(headers.concat());
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: &[u8] = b"\0.text\0.debug_info\0.rel.debug_info\0.BTF\0.shstrtab\0";

    fn section(name: &str, kind: u32, offset: usize, bytes: usize) -> [u8; SECTION_HEADER] {
        let mut header = [0; SECTION_HEADER];
        let ended = [name.as_bytes(), b"\0"].concat();
        let at = NAMES.windows(ended.len()).position(|window| window == ended).unwrap();
        header[..4].copy_from_slice(&u32::try_from(at).unwrap().to_le_bytes());
        header[4..8].copy_from_slice(&kind.to_le_bytes());
        header[24..32].copy_from_slice(&(offset as u64).to_le_bytes());
        header[32..40].copy_from_slice(&(bytes as u64).to_le_bytes());
        header[48] = 1;
        header
    }

    /// A relocatable object for BPF with these sections behind the first, and the names.
    fn object() -> Vec<u8> {
        let contents: [(&str, u32, &[u8]); 5] = [
            (".text", 1, b"programs"),
            (".debug_info", 1, &[0xdd; 333]),
            (".rel.debug_info", 9, &[0xdd; 32]),
            (".BTF", 1, b"types"),
            (".shstrtab", 3, NAMES),
        ];
        let mut out = vec![0; FILE_HEADER];
        let mut headers = vec![[0; SECTION_HEADER]];
        for (name, kind, bytes) in contents {
            headers.push(section(name, kind, out.len(), bytes.len()));
            out.extend(bytes);
        }
        out.resize(out.len().next_multiple_of(8), 0);
        let table = (out.len() as u64).to_le_bytes();
        out.extend(headers.concat());
        out[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
        // Relocatable, of EM_BPF, version 1.
        out[16..24].copy_from_slice(&[1, 0, 247, 0, 1, 0, 0, 0]);
        out[SECTIONS_AT..SECTIONS_AT + 8].copy_from_slice(&table);
        out[52] = 64;
        out[58..64].copy_from_slice(&[64, 0, 6, 0, 5, 0]);
        out
    }

    #[test]
    fn what_a_debugger_reads_is_left_out() {
        let slim = without_debug(&object()).unwrap();
        assert!(!slim.contains(&0xdd));
        let file = object::File::parse(&*slim).unwrap();
        let found: Vec<_> =
            file.sections().map(|s| (s.index().0, s.name().unwrap().to_owned(), s.data().unwrap())).collect();
        let kept = |index, name: &str, data| (index, name.to_owned(), data);
        let empty = |index| kept(index, "", &[][..]);
        let expected = [
            kept(1, ".text", b"programs"),
            empty(2),
            empty(3),
            kept(4, ".BTF", b"types"),
            kept(5, ".shstrtab", NAMES),
        ];
        assert_eq!(found, expected);
        let read_again = object::File::parse(&*without_debug(&slim).unwrap()).unwrap().sections().count();
        assert_eq!(read_again, expected.len());
    }

    #[test]
    fn what_is_no_object_is_refused() {
        without_debug(b"no object").unwrap_err();
    }
}
