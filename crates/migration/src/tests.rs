use proptest::prelude::*;

use super::*;

fn stream(pages: &[(u64, u8)]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), b"config").expect("memory");
    for (first, byte) in pages {
        writer.pages(*first, &[*byte; PAGE_BYTES]).expect("memory");
    }
    writer.machine(b"machine").expect("memory");
    writer.end().expect("memory")
}

/// Pages by frame, each with its first byte, and the machine.
type Whole = (Vec<(u64, u8)>, Vec<u8>);

/// Reads a whole stream.
fn read(bytes: &[u8]) -> Result<Whole, StreamError> {
    let (mut reader, config) = Reader::new(bytes)?;
    assert_eq!(config, b"config");
    let (mut pages, mut machine) = (Vec::new(), Vec::new());
    loop {
        match reader.next()? {
            Record::Config(_) => unreachable!("it comes once"),
            Record::Machine(text) => machine = text.to_vec(),
            Record::Pages { first, bytes } => pages.push((first, bytes[0])),
            Record::End => return Ok((pages, machine)),
        }
    }
}

#[test]
fn what_is_written_is_read() {
    let pages = [(0, 1), (u64::MAX, 2), (0, 3)];
    let (read, machine) = read(&stream(&pages)).expect("valid");
    assert_eq!(read, pages);
    assert_eq!(machine, b"machine");
}

#[test]
fn every_shorter_stream_is_an_error() {
    let whole = stream(&[(7, 7)]);
    for length in 0..whole.len() {
        let fault = read(&whole[..length]).expect_err("it has no end");
        assert!(
            matches!(fault, StreamError::Truncated | StreamError::Magic),
            "{length}: {fault}"
        );
    }
}

#[test]
fn every_changed_bit_behind_the_version_is_found() {
    let whole = stream(&[(7, 7)]);
    for at in (0..whole.len()).filter(|at| !(12..16).contains(at)) {
        let mut changed = whole.clone();
        changed[at] ^= 1 << (at % 8);
        read(&changed).expect_err("a bit is wrong");
    }
}

#[test]
fn other_version_is_named() {
    let mut other = stream(&[]);
    other[8] = 9;
    let fault = read(&other).expect_err("another version");
    assert!(fault.to_string().contains("version 9"), "{fault}");
}

#[test]
fn records_in_wrong_order_or_number_are_refused() {
    let mut machines = Writer::new(Vec::new(), b"config").expect("memory");
    machines.machine(b"1").expect("memory");
    machines.machine(b"2").expect("memory");
    read(&machines.end().expect("memory")).expect_err("two machines");
    let none = Writer::new(Vec::new(), b"config").expect("memory");
    read(&none.end().expect("memory")).expect_err("no machine");
    let mut configs = Writer::new(Vec::new(), b"config").expect("memory");
    configs.record(Kind::Config, &[b"config"]).expect("memory");
    read(&configs.end().expect("memory")).expect_err("two configurations");
    let mut lost = Writer::new(Vec::new(), b"config").expect("memory");
    lost.machine(b"machine").expect("memory");
    lost.pages = 1;
    read(&lost.end().expect("memory")).expect_err("a page is missing");
    let mut uneven = Writer::new(Vec::new(), b"config").expect("memory");
    uneven.record(Kind::Pages, &[&[0; 9]]).expect("memory");
    read(&uneven.end().expect("memory")).expect_err("no whole page");
}

#[test]
fn lengths_beyond_the_limit_take_no_memory() {
    let mut long = stream(&[])[..16].to_vec();
    long.extend(1u32.to_le_bytes());
    long.extend(u32::MAX.to_le_bytes());
    long.extend([0; 8]);
    let fault = read(&long).expect_err("too long");
    assert!(matches!(fault, StreamError::Damaged(_)), "{fault}");
    let huge = vec![0; PAYLOAD_MAX + 1];
    Writer::new(Vec::new(), &huge).expect_err("too long to be written");
}

#[test]
fn what_is_passed_on_is_the_same() {
    let whole = stream(&[(1, 1), (2, 2)]);
    let (mut reader, config) = Reader::new(&whole[..]).expect("valid");
    let mut copy = Vec::new();
    let mut last = 0;
    reader
        .pass_on(&mut copy, |pages| last = pages)
        .expect("valid");
    assert_eq!(last, 2);
    assert_eq!(config, b"config");
    assert_eq!(copy, whole[whole.len() - copy.len()..]);
    let mut rest = Reader::continued(&copy[..]);
    assert!(matches!(
        rest.next().expect("valid"),
        Record::Pages { first: 1, .. }
    ));
}

proptest! {
    #[test]
    fn any_bytes_are_no_stream(mut bytes in prop::collection::vec(any::<u8>(), 0..200), begin: bool) {
        if begin {
            let mut with = stream(&[])[..16].to_vec();
            with.append(&mut bytes);
            bytes = with;
        }
        prop_assert!(read(&bytes).is_err());
    }
}

#[test]
fn failure_is_passed_on_and_told_without_control_characters() {
    let mut bytes = Vec::new();
    let mut writer = Writer::new(&mut bytes, b"config").expect("memory");
    writer.machine(b"machine").expect("memory");
    writer.fail("the disk \x1b[2Jis full").expect("memory");
    let mut passed = Vec::new();
    let (mut reader, _) = Reader::new(&bytes[..]).expect("valid");
    let fault = reader
        .pass_on(&mut passed, |_| ())
        .expect_err("it has failed");
    assert_eq!(fault.to_string(), "the disk [2Jis full");
    let mut next = Reader::continued(&passed[..]);
    assert!(matches!(next.next(), Ok(Record::Machine(_))));
    assert!(matches!(next.next(), Err(StreamError::Failed(_))));
    assert!(matches!(next.next(), Err(StreamError::Truncated)));
}
