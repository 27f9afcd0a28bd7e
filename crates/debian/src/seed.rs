//! The seed disk of cloud-init's NoCloud data source: a small ISO 9660 volume called `cidata`.
//!
//! Layout (ECMA-119): 16 empty sectors, one primary volume descriptor, the set terminator, two path tables, the root
//! directory, then the files. Names are in capitals, as the standard wants; Linux shows them in small letters.

/// Bytes of a sector.
const SECTOR: usize = 2048;
const PRIMARY: usize = 16;
const TERMINATOR: usize = 17;
const PATH_TABLE_LITTLE: usize = 18;
const PATH_TABLE_BIG: usize = 19;
const ROOT: usize = 20;
const FIRST_FILE: usize = 21;
/// The name under which cloud-init looks for it.
const LABEL: &[u8] = b"cidata";
/// A file of the seed is small; larger ones would be a mistake.
pub const FILE_BYTES_MAX: usize = 16 << 20;

/// Why a seed cannot be made.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SeedError {
    #[error(
        "`{0}' is no name for a file of a seed disk: letters, digits, hyphens and underscores, at most 30"
    )]
    Name(String),
    #[error("{name} has {bytes} bytes and a seed's files may have 16 MiB: shorten it")]
    Size { name: String, bytes: usize },
    #[error("a seed disk holds at most 20 files, not {0}")]
    Count(usize),
}

/// The bytes of a seed disk with these files (name, content). The same files give the same bytes.
pub fn volume(files: &[(&str, &[u8])]) -> Result<Vec<u8>, SeedError> {
    // One sector of directory records has room for no more.
    if files.len() > 20 {
        return Err(SeedError::Count(files.len()));
    }
    let mut sorted: Vec<(String, &[u8])> = Vec::new();
    for (name, content) in files {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        if name.is_empty() || name.len() > 30 || !name.bytes().all(allowed) {
            return Err(SeedError::Name((*name).into()));
        }
        if content.len() > FILE_BYTES_MAX {
            return Err(SeedError::Size {
                name: (*name).into(),
                bytes: content.len(),
            });
        }
        sorted.push((format!("{}.;1", name.to_ascii_uppercase()), content));
    }
    sorted.sort();

    let mut directory = record(&[0], ROOT, SECTOR, true);
    directory.extend(record(&[1], ROOT, SECTOR, true));
    let mut data = Vec::new();
    for (name, content) in &sorted {
        let sector = FIRST_FILE + data.len() / SECTOR;
        directory.extend(record(name.as_bytes(), sector, content.len(), false));
        data.extend_from_slice(content);
        data.resize(data.len().next_multiple_of(SECTOR), 0);
    }

    let sectors = FIRST_FILE + data.len() / SECTOR;
    let mut volume = vec![0; FIRST_FILE * SECTOR];
    put(&mut volume, PRIMARY, &primary(sectors));
    put(&mut volume, TERMINATOR, b"\xffCD001\x01");
    put(
        &mut volume,
        PATH_TABLE_LITTLE,
        &path_table(u32::to_le_bytes, u16::to_le_bytes),
    );
    put(
        &mut volume,
        PATH_TABLE_BIG,
        &path_table(u32::to_be_bytes, u16::to_be_bytes),
    );
    put(&mut volume, ROOT, &directory);
    volume.extend(data);
    Ok(volume)
}

fn put(volume: &mut [u8], sector: usize, bytes: &[u8]) {
    volume[sector * SECTOR..][..bytes.len()].copy_from_slice(bytes);
}

/// A 32-bit number in both byte orders (7.3.3).
fn both32(number: usize) -> [u8; 8] {
    let number = u32::try_from(number).unwrap_or(u32::MAX);
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    bytes[4..].copy_from_slice(&number.to_be_bytes());
    bytes
}

/// A 16-bit number in both byte orders (7.2.3).
fn both16(number: u16) -> [u8; 4] {
    let (little, big) = (number.to_le_bytes(), number.to_be_bytes());
    [little[0], little[1], big[0], big[1]]
}

/// A directory record (9.1). Times are the epoch's: the same files give the same bytes.
fn record(name: &[u8], sector: usize, bytes: usize, directory: bool) -> Vec<u8> {
    let length = (33 + name.len()).next_multiple_of(2);
    let mut record = Vec::with_capacity(length);
    record.extend([u8::try_from(length).unwrap_or(u8::MAX), 0]);
    record.extend(both32(sector));
    record.extend(both32(bytes));
    record.extend([70, 1, 1, 0, 0, 0, 0]);
    record.extend([if directory { 2 } else { 0 }, 0, 0]);
    record.extend(both16(1));
    record.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
    record.extend(name);
    record.resize(length, 0);
    record
}

/// The path table (9.4) of a volume with nothing but its root.
fn path_table(long: fn(u32) -> [u8; 4], short: fn(u16) -> [u8; 2]) -> Vec<u8> {
    let mut table = vec![1, 0];
    table.extend(long(ROOT as u32));
    table.extend(short(1));
    table.extend([0, 0]);
    table
}

/// The primary volume descriptor (8.4).
fn primary(sectors: usize) -> Vec<u8> {
    let mut descriptor = vec![0; SECTOR];
    let mut field = |offset: usize, bytes: &[u8]| {
        descriptor[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    field(0, b"\x01CD001\x01");
    field(8, &[b' '; 64]);
    field(40, LABEL);
    field(80, &both32(sectors));
    field(120, &both16(1));
    field(124, &both16(1));
    field(128, &both16(SECTOR as u16));
    field(132, &both32(10));
    field(140, &(PATH_TABLE_LITTLE as u32).to_le_bytes());
    field(148, &(PATH_TABLE_BIG as u32).to_be_bytes());
    field(156, &record(&[0], ROOT, SECTOR, true));
    field(190, &[b' '; 623]);
    for date in [813, 830, 847, 864] {
        // No date: sixteen zeros as digits and no zone (8.4.26.1).
        field(date, b"0000000000000000\0");
    }
    field(881, &[1]);
    descriptor
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn little32(bytes: &[u8]) -> usize {
        u32::from_le_bytes(bytes[..4].try_into().unwrap()) as usize
    }

    /// What a reader of ECMA-119 finds: the label and the files of the root directory.
    fn read(volume: &[u8]) -> (String, Vec<(String, Vec<u8>)>) {
        let primary = &volume[PRIMARY * SECTOR..][..SECTOR];
        assert_eq!(&primary[..7], b"\x01CD001\x01");
        assert_eq!(little32(&primary[80..]) * SECTOR, volume.len());
        let label = String::from_utf8(primary[40..72].to_vec()).unwrap();
        let root = &primary[156..190];
        let mut directory = &volume[little32(&root[2..]) * SECTOR..][..little32(&root[10..])];
        let mut files = Vec::new();
        while directory[0] != 0 {
            let (record, rest) = directory.split_at(directory[0] as usize);
            directory = rest;
            assert_eq!(
                record[2..6].iter().rev().copied().collect::<Vec<_>>(),
                record[6..10]
            );
            let name = &record[33..33 + record[32] as usize];
            if record[25] & 2 == 0 {
                let content = &volume[little32(&record[2..]) * SECTOR..][..little32(&record[10..])];
                files.push((String::from_utf8(name.to_vec()).unwrap(), content.to_vec()));
            }
        }
        (label.trim_end().into(), files)
    }

    #[test]
    fn volume_two_files_can_be_read_again() {
        let volume = volume(&[("user-data", b"#cloud-config\n"), ("meta-data", b"")]).unwrap();
        let (label, files) = read(&volume);
        assert_eq!(label, "cidata");
        assert_eq!(files[0], ("META-DATA.;1".into(), Vec::new()));
        assert_eq!(
            files[1],
            ("USER-DATA.;1".into(), b"#cloud-config\n".to_vec())
        );
    }

    #[test]
    fn volume_wrong_names_and_sizes_are_refused() {
        assert_eq!(volume(&[("a/b", b"")]), Err(SeedError::Name("a/b".into())));
        assert_eq!(volume(&[("", b"")]), Err(SeedError::Name(String::new())));
        let large = vec![0; FILE_BYTES_MAX + 1];
        assert!(matches!(
            volume(&[("a", &large)]),
            Err(SeedError::Size { .. })
        ));
        assert_eq!(
            volume(&[("a", b"".as_slice()); 21]),
            Err(SeedError::Count(21))
        );
    }

    proptest! {
        #[test]
        fn volume_any_files_can_be_read_again(
            files in prop::collection::btree_map("[a-z][a-z_-]{0,29}", prop::collection::vec(any::<u8>(), 0..5000), 0..20)
        ) {
            let given: Vec<(&str, &[u8])> = files.iter().map(|(name, content)| (name.as_str(), content.as_slice())).collect();
            let volume = volume(&given).unwrap();
            let found = read(&volume).1;
            prop_assert_eq!(found.len(), files.len());
            for (name, content) in found {
                let name = name.trim_end_matches(".;1").to_ascii_lowercase();
                prop_assert_eq!(files.get(&name), Some(&content));
            }
        }
    }
}
